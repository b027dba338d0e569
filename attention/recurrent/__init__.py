"""Recurrent mixers, which keep a state of fixed size instead of a KV cache.

Letters in the comments on shapes:

- `b` batch, `l` length, `w` width of the inputs
- `h` heads, `g` groups of heads that share queries and keys
- `k` key_dim, `v` value_dim
- `n` chunks of a sequence, `c` tokens of a chunk
"""
