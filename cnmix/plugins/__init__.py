"""What the plugins and callbacks of training frameworks have in common."""
