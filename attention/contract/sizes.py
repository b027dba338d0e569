"""Sizes of tensors, known or not yet."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.context import context


def static_size(x: Any, axis: int) -> int | None:
    """The size of an axis, or `None` where it is not known, or a stand-in.

    While Keras works out the outputs of a layer, unknown sizes are symbols on
    JAX. On torch they are made-up numbers: on the meta device, or on another
    one where the meta device can't compute something.
    """
    shape = getattr(x, "shape", ())
    if len(shape) <= axis or getattr(getattr(x, "device", None), "type", "") == "meta":
        return None
    if context().made_up_sizes and not isinstance(x, keras.KerasTensor):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def sequence_length(x: Any) -> Any:
    """The size of axis 1 of a batch of sequences.

    An int, or a tensor where a graph on TensorFlow takes any length, or `None`
    where nothing is computed but shapes.
    """
    length = static_size(x, 1)
    unknown = length is None and x.shape[1] is None
    return keras.ops.shape(x)[1] if unknown else length


def is_concrete(x: Any) -> bool:
    """Whether a tensor has values, rather than being part of what is traced."""
    try:
        ops.convert_to_numpy(x)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True
