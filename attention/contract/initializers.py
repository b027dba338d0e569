"""Copies of initializers."""

from __future__ import annotations

import keras

from attention.contract.types import Initializer


def clone_initializer(initializer: Initializer, number: int = 0) -> Initializer:
    """Returns an initializer of the same configuration.

    An initializer draws the same numbers each time it is used, so weights that must
    differ need copies.

    Args:
        initializer: a `keras.initializers.Initializer`, or any other callable,
            which is returned as it is.
        number: int. Added to the seed if that is an int, so that copies with other
            numbers draw other values.
    """
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if isinstance(config.get("seed"), int):
        config["seed"] += number
    return type(initializer).from_config(config)
