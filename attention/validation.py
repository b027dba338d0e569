"""Checks of arguments, and the words for what was received."""

from __future__ import annotations

import contextvars
import numbers
from typing import Any

import keras
import numpy as np
from keras import ops

# Whether a layer runs on stand-ins for tensors whose sizes are not known.
MADE_UP_SIZES: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "keras_transformer_blocks_made_up_sizes", default=False
)


def describe(value: Any) -> str:
    """Describes a value for an error message: types and shapes, no contents.

    Args:
        value: anything.

    Returns:
        A short string.

    Example:

    >>> import numpy as np
    >>> from attention import describe
    >>> describe({"key": np.zeros((2, 4), "float32")})
    "{'key': float32 tensor of shape (2, 4)}"
    """
    if value is None or isinstance(value, (bool, numbers.Number, str)):
        return repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{dtype_name(value)} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        inner = ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items())
        return f"{{{inner}}}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(describe(v) for v in value[:3])
        more = f", ... {len(value)} in all" if len(value) > 3 else ""
        return f"{type(value).__name__}({shown}{more})"
    return f"an instance of {type(value).__name__}"


def dtype_name(x: Any) -> str:
    """The name of a tensor's dtype, also where it is none of Keras's."""
    try:
        return keras.backend.standardize_dtype(x.dtype)
    except ValueError:
        return str(x.dtype)


def check_positive_int(name: str, value: Any) -> int:
    """Returns an argument as an int, or says that it must be a positive one.

    Args:
        name: str. The name of the argument, for the message.
        value: what was received.

    Returns:
        An int.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is not positive.

    Example:

    >>> from attention import check_positive_int
    >>> check_positive_int("num_heads", 8)
    8
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"`{name}` must be a positive integer. Received: {name}={describe(value)}"
        )
    if value <= 0:
        raise ValueError(
            f"`{name}` must be a positive integer. Received: {name}={value}"
        )
    return int(value)


def check_fraction(name: str, value: Any) -> float:
    """Returns an argument as a float, or says that it must be in `[0, 1)`.

    Args:
        name: str. The name of the argument, for the message.
        value: what was received.

    Returns:
        A float.

    Raises:
        ValueError: if it is no number of at least 0 and below 1.

    Example:

    >>> from attention import check_fraction
    >>> check_fraction("dropout", 0.1)
    0.1
    """
    if not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number of at least 0 and below 1. Received: "
            f"{name}={describe(value)}"
        )
    return float(value)


def check_soft_cap(value: Any) -> float | None:
    """Returns a positive number or `None`, or says what may be given."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            "`logit_soft_cap` must be a number or None, which means no cap. "
            f"Received: logit_soft_cap={describe(value)}"
        )
    if value <= 0:
        raise ValueError(
            "`logit_soft_cap` must be positive: logits are kept between it and its "
            f"negative. Received: logit_soft_cap={value}"
        )
    return float(value)


def refuse_arguments(layer: Any, given: dict[str, Any], **reasons: str) -> None:
    """Says so when a layer gets an argument that it has no use for.

    Args:
        layer: the layer.
        given: the arguments that it would hand on.
        **reasons: why it can't use them, by their names.

    Raises:
        TypeError: if so.
    """
    for name, reason in reasons.items():
        if name in given:
            raise TypeError(
                f"`{type(layer).__name__}` takes no `{name}`: {reason}. Received: "
                f"{name}={describe(given[name])}"
            )


def check_rewind_indices(from_index: Any, to_index: Any) -> None:
    """Says so when a cache can't be asked to go from one index back to another.

    Args:
        from_index: how many positions the cache has absorbed.
        to_index: how many of them are to be kept.

    Raises:
        ValueError: if one is no integer, or not `from_index >= to_index >= 0`.
    """
    known = all(
        isinstance(x, (int, np.integer)) and not isinstance(x, bool)
        for x in (from_index, to_index)
    )
    if not known or not from_index >= to_index >= 0:
        raise ValueError(
            "`from_index`, how many positions the cache has absorbed, and `to_index`, "
            "how many of them are kept, must be integers with from_index >= to_index "
            f">= 0. Received: from_index={describe(from_index)}, "
            f"to_index={describe(to_index)}. Where rows differ, ask with the largest "
            "`from_index` and the smallest `to_index`."
        )


def static_size(x: Any, axis: int) -> int | None:
    """The size of an axis, or `None` where it is not known, or a stand-in.

    While Keras works out the outputs of a layer, unknown sizes are symbols on
    JAX. On torch they are made-up numbers: on the meta device, or on another
    one where the meta device can't compute something.
    """
    shape = getattr(x, "shape", ())
    if len(shape) <= axis or getattr(getattr(x, "device", None), "type", "") == "meta":
        return None
    if MADE_UP_SIZES.get() and not isinstance(x, keras.KerasTensor):
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
