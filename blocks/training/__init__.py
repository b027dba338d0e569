"""Training of language models: losses, metrics, and how a step computes them."""
