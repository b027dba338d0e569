"""Copies of initializers."""

from __future__ import annotations

from typing import Any

import keras


def clone_initializer(initializer: Any, number: int = 0) -> Any:
    """Returns an initializer of the same configuration.

    One initializer object draws the same numbers each time it is used; layers
    that must differ need copies.

    Args:
        initializer: a `keras.initializers.Initializer`, or any other callable,
            which is returned as it is.
        number: int. Copies of other numbers draw other values also where the seed is
            an int.

    Returns:
        An initializer.

    Example:

    >>> import keras
    >>> from attention.contract import clone_initializer
    >>> initializer = keras.initializers.RandomNormal(stddev=0.02)
    >>> clone_initializer(initializer).stddev
    0.02
    """
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if isinstance(config.get("seed"), int):
        config["seed"] += number
    return type(initializer).from_config(config)
