"""What exists for one backend: how a step is compiled, and what its compiler needs."""
