"""Attention by softmax: the base class, its variants and kernels."""
