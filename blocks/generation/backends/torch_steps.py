"""A step of generation on torch, where nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch


def without_gradients(function: Callable) -> Callable:
    """Returns `function` as one that keeps nothing for a backward pass."""
    return torch.no_grad()(function)
