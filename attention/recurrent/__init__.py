"""Recurrent mixers, which keep a state of fixed size instead of a KV cache."""
