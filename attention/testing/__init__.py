"""Checks of the contract, for your cached layers and models as well as ours."""

from __future__ import annotations

import importlib
from typing import Any

from attention.testing.checking import check_cached_layer, check_cached_model
from attention.testing.running import ConformanceError

__all__ = ["ConformanceError", "check_cached_layer", "check_cached_model"]


def __getattr__(name: str) -> Any:
    # It is in `blocks.testing`, which this package must not know: only who asks for
    # it here, as was right before, needs that one.
    if name == "check_causal_lm":
        return importlib.import_module("blocks.testing").check_causal_lm
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
