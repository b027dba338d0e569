"""Softmax attention: its base class, a file for each variant, and the kernels."""
