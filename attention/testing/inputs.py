"""What the inputs of a model look like, and random ones like them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import tree

from attention.contract.arguments import describe
from attention.contract.cached_model import symbolic_inputs
from attention.contract.inner_layers import all_layers
from attention.testing.backends import to_numpy


class InputSpec:
    """The shape, dtype and range of values of an input of a model."""

    def __init__(self, shape: tuple, dtype: str, low: int, high: int, is_mask: bool):
        self.shape, self.dtype, self.is_mask = shape, dtype, is_mask
        self.low, self.high = low, high

    def draw(self, rng: np.random.Generator, batch_size: int, length: int) -> Any:
        shape = (batch_size, length, *self.shape)
        if self.is_mask:
            return np.ones(shape, self.dtype)
        if "float" in self.dtype:
            return rng.normal(size=shape).astype("float32")
        return rng.integers(self.low, self.high, size=shape).astype(self.dtype)


def input_specs(model: keras.Model, example: Any) -> Any:
    """What the inputs of a model look like: a pytree of `InputSpec`s."""
    if example is not None:
        paths = tree.flatten_with_path(example)
        specs = [
            InputSpec(
                tuple(x.shape)[2:],
                keras.backend.standardize_dtype(x.dtype),
                int(to_numpy(x).min()),
                int(to_numpy(x).max()) + 1,
                _is_mask(path),
            )
            for path, x in paths
        ]
        return tree.pack_sequence_as(example, specs)
    structure = symbolic_inputs(model)
    paths = tree.flatten_with_path(structure)
    for _, x in paths:
        if len(x.shape) < 2 or x.shape[0] is not None or x.shape[1] is not None:
            raise ValueError(
                f"The inputs of '{model.name}' must be of shape (batch, length, "
                "...) with a free batch size and length, so that it can be called "
                f"on parts of a sequence. Received: {describe(x)} for input "
                f"'{x.name}'. Make it with `keras.Input((None, ...))`."
            )
    specs = []
    for path, x in paths:
        is_mask = _is_mask(path) or "mask" in x.name
        high = 2
        if not is_mask and "int" in str(x.dtype):
            high = _vocabulary_size(model, x.name)
        # 0 is what pads, in many models.
        specs.append(InputSpec(tuple(x.shape)[2:], x.dtype, 1, high, is_mask))
    return tree.pack_sequence_as(structure, specs)


def _is_mask(path: tuple) -> bool:
    return any("mask" in str(key) for key in path)


def _vocabulary_size(model: keras.Model, name: str) -> int:
    size = getattr(model, "vocabulary_size", None)
    if size is None:
        embeddings = [
            layer.input_dim
            for layer in all_layers(model)
            if isinstance(layer, keras.layers.Embedding)
        ]
        size = min(embeddings, default=None)
    if size is None:
        raise ValueError(
            f"It is not known which integers the input '{name}' of "
            f"'{model.name}' takes: it has no `vocabulary_size` and no "
            "`keras.layers.Embedding`. Pass `inputs`, an example of the inputs."
        )
    return int(size)
