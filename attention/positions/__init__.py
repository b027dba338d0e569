"""Position schemes, the position embedding, and arithmetic of positions."""
