"""Measurements of this library beside others. `python -m benchmarks.generate`."""
