"""Checks of generation, for your language models as well as ours."""

from blocks.testing.causal_lm import check_causal_lm
from blocks.testing.seq2seq_lm import check_seq2seq_lm

__all__ = ["check_causal_lm", "check_seq2seq_lm"]
