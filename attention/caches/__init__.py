"""Cache policies: where what attention remembers is kept."""
