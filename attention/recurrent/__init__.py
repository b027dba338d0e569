"""Recurrent mixers: a state instead of keys and values."""
