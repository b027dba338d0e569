"""The layers within a layer."""

from __future__ import annotations

from typing import Any

import keras


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer or model and the layers within it, each once.

    Keras lists the layers of a model, but not those of a layer. They are found in its
    attributes: also in lists, tuples (named ones, too) and dicts.
    """
    found: dict[int, keras.layers.Layer] = {}
    waiting: list[Any] = [layer]
    while waiting:
        value = waiting.pop()
        if isinstance(value, keras.layers.Layer):
            if id(value) not in found:
                found[id(value)] = value
                waiting.extend(vars(value).values())
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
    return list(found.values())
