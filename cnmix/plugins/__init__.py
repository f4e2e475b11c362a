"""What the plugins for ``lightning`` and for ``pytorch_lightning`` share; imports neither."""
