"""Feed-forward layers and norms, ready for the hooks."""
