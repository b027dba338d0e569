"""Positions: schemes, embeddings and arithmetic."""
