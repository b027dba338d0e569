"""Checks of arguments, and descriptions of values for messages."""

from __future__ import annotations

import numbers
from typing import Any

import keras
import numpy as np


def describe(value: Any) -> str:
    """Describes a value for an error message: types and shapes, no contents.

    Args:
        value: anything.

    Returns:
        A short string.

    Example:

    >>> import numpy as np
    >>> from attention.contract import describe
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
    """Returns the name of a tensor's dtype, also if Keras does not know it."""
    try:
        return keras.backend.standardize_dtype(x.dtype)
    except ValueError:
        return str(x.dtype)


def check_positive_int(name: str, value: Any) -> int:
    """Returns an argument as an int, and checks that it is positive.

    Args:
        name: str. The name of the argument, for the message.
        value: what was received.

    Returns:
        An int.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is not positive.

    Example:

    >>> from attention.contract import check_positive_int
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


def check_optional_positive_int(name: str, value: Any) -> int | None:
    """Returns `None`, or what `check_positive_int` returns."""
    return None if value is None else check_positive_int(name, value)


def check_fraction(name: str, value: Any) -> float:
    """Returns an argument as a float, and checks that it is in `[0, 1)`.

    Args:
        name: str. The name of the argument, for the message.
        value: what was received.

    Returns:
        A float.

    Raises:
        ValueError: if it is not a number of at least 0 and below 1.

    Example:

    >>> from attention.contract import check_fraction
    >>> check_fraction("dropout", 0.1)
    0.1
    """
    if not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number of at least 0 and below 1. Received: "
            f"{name}={describe(value)}"
        )
    return float(value)


def refuse_arguments(layer: Any, given: dict[str, Any], **reasons: str) -> None:
    """Refuses arguments that a layer inherits but can't use.

    Args:
        layer: the layer.
        given: the arguments that it received for its base class.
        **reasons: why it can't use them, by their names.

    Raises:
        TypeError: if one of them is given.
    """
    for name, reason in reasons.items():
        if name in given:
            raise TypeError(
                f"`{type(layer).__name__}` takes no `{name}`: {reason}. Received: "
                f"{name}={describe(given[name])}"
            )


def check_soft_cap(value: Any) -> float | None:
    """Returns `logit_soft_cap` as a float, and checks that it is positive or `None`."""
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
