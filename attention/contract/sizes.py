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
    if len(shape) <= axis or torch_device(x) == "meta":
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


def torch_device(x: Tensor) -> str:
    """Returns where a tensor of torch is, such as `"cpu"`; `""` on other backends.

    A tensor in a trace of JAX is not asked for its device: it would look through all
    that was traced so far to write an error message, which is most of a compilation.
    """
    if keras.config.backend() != "torch":
        return ""
    return getattr(getattr(x, "device", None), "type", "")


def is_concrete(x: Tensor) -> bool:
    """Returns whether a tensor has values: it has none in a trace."""
    if keras.config.backend() == "jax":
        # Not by trying, for the reason above.
        import jax

        return not isinstance(x, (keras.KerasTensor, jax.core.Tracer))
    try:
        ops.convert_to_numpy(x)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True


def is_tensor(x: Any) -> bool:
    """Returns whether something is a tensor or an array, of whatever backend."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def trace_state() -> Any:
    """Returns a value that is another one inside of a function that is traced on its own.

    `None` where there is no such value.
    """
    if keras.config.backend() != "jax":
        return None
    import jax

    return jax.core.get_opaque_trace_state(convention="nnx")
