"""Checks for cached layers, models and generation, yours as well as ours."""

from attention.testing.causal_lm import check_causal_lm
from attention.testing.checking import check_cached_layer, check_cached_model
from attention.testing.failure import ConformanceError

__all__ = [
    "ConformanceError",
    "check_cached_layer",
    "check_cached_model",
    "check_causal_lm",
]
