"""Feed-forward layers and norms, for the hooks to return."""
