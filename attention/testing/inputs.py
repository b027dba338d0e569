"""Random inputs of a model, like an example or as its symbolic inputs say."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import tree

from attention.contract.arguments import describe
from attention.contract.cached_model import symbolic_inputs
from attention.contract.inner_layers import all_layers
from attention.testing.backends import to_numpy


@dataclasses.dataclass
class InputSpec:
    """The shape after the length, the dtype and the range of values of an input."""

    shape: tuple
    dtype: str
    low: int
    high: int
    is_mask: bool

    def draw(self, rng: np.random.Generator, batch_size: int, length: int) -> Any:
        shape = (batch_size, length, *self.shape)
        if self.is_mask:
            return np.ones(shape, self.dtype)
        if "float" in self.dtype:
            return rng.normal(size=shape).astype("float32")
        return rng.integers(self.low, self.high, size=shape).astype(self.dtype)


def input_specs(model: keras.Model, example: Any) -> Any:
    """Returns what the inputs of a model look like: a pytree of `InputSpec`s."""
    structure = symbolic_inputs(model) if example is None else example
    specs = []
    for path, x in tree.flatten_with_path(structure):
        name = x.name if example is None else ""
        is_mask = "mask" in name or any("mask" in str(key) for key in path)
        dtype = keras.backend.standardize_dtype(x.dtype)
        low, high = 1, 2  # 0 is what pads, in many models
        if example is not None:
            low, high = int(to_numpy(x).min()), int(to_numpy(x).max()) + 1
        elif len(x.shape) < 2 or x.shape[0] is not None or x.shape[1] is not None:
            raise ValueError(
                f"The inputs of '{model.name}' must be of shape (batch, length, "
                "...) with a free batch size and length, so that it can be called "
                f"on parts of a sequence. Received: {describe(x)} for input "
                f"'{name}'. Make it with `keras.Input((None, ...))`."
            )
        elif "int" in dtype and not is_mask:
            high = _vocabulary_size(model, name)
        specs.append(InputSpec(tuple(x.shape)[2:], dtype, low, high, is_mask))
    return tree.pack_sequence_as(structure, specs)


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
