"""Checks of arguments, and descriptions of values for messages."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

import keras
import numpy as np


def describe(value: Any) -> str:
    """Describes any value for an error message: types and shapes, no contents.

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
    """Returns the argument called `name` as an int, and checks that it is positive.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is not positive.
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
    """Returns the argument called `name` as a float, and checks that it is in `[0, 1)`.

    Raises:
        ValueError: if it is not a number of at least 0 and below 1.
    """
    if not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number of at least 0 and below 1. Received: "
            f"{name}={describe(value)}"
        )
    return float(value)


def refuse_arguments(layer: Any, given: dict[str, Any], **reasons: str) -> None:
    """Raises a `TypeError` if a layer is `given` an inherited argument it can't use.

    The reasons are given by the names of the arguments.
    """
    for name, reason in reasons.items():
        if name in given:
            raise TypeError(
                f"`{type(layer).__name__}` takes no `{name}`: {reason}. Received: "
                f"{name}={describe(given[name])}"
            )


def check_number(name: str, value: Any, none: str = "") -> float | None:
    """Returns an argument as a float; `none` says what `None` means, if it may be."""
    if value is None and none:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        also = f" or None, which means {none}" if none else ""
        raise TypeError(
            f"`{name}` must be a number{also}. Received: {name}={describe(value)}"
        )
    return float(value)


def arguments_of(cls: Any, layer: Any) -> dict[str, Any]:
    """Returns the arguments that the constructor of a class names, from a layer.

    They are its attributes of these names, serialized for `get_config`.
    """
    found = list(inspect.signature(cls.__init__).parameters.values())[1:]
    names = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    serialize = keras.saving.serialize_keras_object
    return {name: serialize(getattr(layer, name)) for name in names}
