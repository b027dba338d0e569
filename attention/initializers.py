"""Copies of initializers."""

from __future__ import annotations

from typing import Any

import keras


def clone_initializer(initializer: Any) -> Any:
    """Returns an initializer of the same configuration.

    One initializer object draws the same numbers each time it is used; layers
    that must differ need copies.

    Args:
        initializer: a `keras.initializers.Initializer`, or any other callable,
            which is returned as it is.

    Returns:
        An initializer.

    Example:

    >>> import keras
    >>> from attention import clone_initializer
    >>> initializer = keras.initializers.RandomNormal(stddev=0.02)
    >>> clone_initializer(initializer).stddev
    0.02
    """
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    return type(initializer).from_config(initializer.get_config())
