"""Sizes of tensors, known or not yet."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.context import context
from attention.contract.types import Tensor


def static_size(x: Tensor, axis: int) -> int | None:
    """Returns the size of an axis, or `None` where it is not known.

    While Keras computes the shapes of a layer's outputs, unknown sizes are symbols on
    JAX. On torch they are made-up numbers: on the meta device, or on another device
    where the meta device can't compute something.
    """
    shape = getattr(x, "shape", ())
    if len(shape) <= axis or getattr(getattr(x, "device", None), "type", "") == "meta":
        return None
    if context().made_up_sizes and not isinstance(x, keras.KerasTensor):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def sequence_length(x: Tensor) -> Any:
    """Returns the size of axis 1: an int where it is known.

    In a TensorFlow graph for any length it is a tensor; `None` where only shapes count.
    """
    length = static_size(x, 1)
    unknown = length is None and x.shape[1] is None
    return keras.ops.shape(x)[1] if unknown else length


def is_concrete(x: Tensor) -> bool:
    """Returns whether a tensor has values: it has none in a trace."""
    try:
        ops.convert_to_numpy(x)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True


def is_tensor(x: Any) -> bool:
    """Returns whether something is a tensor or an array, of whatever backend."""
    return hasattr(x, "shape") and hasattr(x, "dtype")
