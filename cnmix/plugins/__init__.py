"""What the plugins and callbacks for ``lightning`` and for ``pytorch_lightning`` share; imports neither."""
