"""Refuses an optimizer whose numbers the dtype of the weights can't hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

# As Keras's optimizers name how much of their averages stays at each step.
_NAMES = ("beta_1", "beta_2", "adam_beta_1", "adam_beta_2")


def check_optimizer(optimizer: Any, variables: Sequence[keras.Variable]) -> None:
    """Raises a `ValueError` if a `beta` of an optimizer is 1 in the dtype of a weight.

    Keras computes updates in the dtype of each weight. In bfloat16 0.999, Adam's
    default, is 1, and so is each power of it, by whose distance from 1 averages are
    corrected: Adam's updates are 0, and others are NaN.

    Args:
        optimizer: a `keras.optimizers.Optimizer`, or `None`.
        variables: the weights that it is to train.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    for name in _NAMES:
        value = getattr(optimizer, name, 0.0)
        for dtype in sorted({x.dtype for x in variables}):
            if value < 1 and float(ops.cast(value, dtype)) == 1:
                raise ValueError(
                    f"`{name}={value}` of the optimizer {type(optimizer).__name__} "
                    f"rounds to 1 in {dtype}, the dtype of weights, in which Keras "
                    "computes updates: they would be 0 or NaN. Make the model with "
                    '`dtype="mixed_bfloat16"`, which keeps weights in float32, or pass '
                    f"the optimizer a smaller number, such as `{name}=0.99`."
                )
