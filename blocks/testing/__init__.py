"""Checks of generation, for your language models as well as ours."""

from blocks.testing.causal_lm import check_causal_lm

__all__ = ["check_causal_lm"]
