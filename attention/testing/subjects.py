"""What is checked: a cached layer, or any Keras model made of cached layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from attention.contract.arguments import describe
from attention.contract.cached_layer import CachedLayer
from attention.contract.cached_model import (
    call_sites,
    call_with_cache,
    can_rewind,
    create_cache,
    grow_cache,
    max_positions,
)
from attention.testing.backends import dtype_policy, is_tensor
from attention.testing.inputs import input_specs

# Noise that is added to all trainable weights, so that what starts at zero (a
# bias, a gate) takes part in the outputs.
_NOISE = 0.1


class Subject:
    """Makes the objects to check, and calls them all in the same way.

    Args:
        make: a factory of new objects.
        batch_size: int. The number of rows.
        length: int. The length of the sequences, and of the caches.
        dtype: the dtype policy under which objects are made.
        seed: int. What all random numbers are drawn from.
    """

    argument = "make_layer"
    # What is allowed beyond rounding.
    tolerance = 0.0

    def __init__(
        self, make: Callable, batch_size: int, length: int, dtype: Any, seed: int
    ) -> None:
        if not callable(make) or isinstance(make, keras.layers.Layer):
            raise TypeError(
                f"`{self.argument}` must be a function without arguments that makes "
                f"a new one, such as `lambda: MyLayer(4)`. Received: "
                f"{self.argument}={describe(make)}"
            )
        self._make = make
        self.batch_size = batch_size
        self.length = length
        self.dtype = dtype
        self.seed = seed
        # A third of the sequence is read at once, the rest in other ways.
        self.prefill_size = max(1, length // 3)
        self.doing = "made"

    def new(self, dtype: Any = None, like: Any = None) -> Any:
        """Makes a built object, always with the same weights.

        Args:
            dtype: the dtype policy; `None` means the one of the check.
            like: an object whose weights are copied.
        """
        with dtype_policy(dtype or self.dtype):
            keras.utils.set_random_seed(self.seed)
            made = self._make()
            self.check_type(made)
            self.build(made)
        if like is not None:
            copy_weights(like, made)
            return made
        rng = np.random.default_rng(self.seed)
        for variable in made.trainable_variables:
            if "float" in keras.backend.standardize_dtype(variable.dtype):
                noise = rng.normal(scale=_NOISE, size=tuple(variable.shape))
                variable.assign(variable + ops.cast(noise, variable.dtype))
        return made

    def require_new(self, made: Any) -> None:
        """Says so when the factory returns one and the same object each time."""
        if self._make() is made:
            raise ValueError(
                f"`{self.argument}` returned the same object twice. Make the layer "
                "inside of it: `lambda: MyLayer(4)`."
            )

    def sample(self, seed: int) -> Any:
        """Random inputs over the whole length: a pytree of arrays."""
        rng = np.random.default_rng([self.seed, seed])
        return self.draw(rng, self.batch_size, self.length)

    def check_type(self, made: Any) -> None:
        raise NotImplementedError

    def build(self, made: Any) -> None:
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, batch_size: int, length: int) -> Any:
        raise NotImplementedError

    def create_cache(self, made: Any, batch_size: int, length: int) -> Any:
        raise NotImplementedError

    def grow_cache(self, made: Any, cache: Any, length: int) -> Any:
        raise NotImplementedError

    def can_rewind(self, made: Any) -> Callable[[Any, int, int], bool]:
        """What says of a cache, and two indices, whether it can be rewound."""
        raise NotImplementedError

    def limit(self, made: Any) -> int | None:
        """The largest number of positions it can represent."""
        raise NotImplementedError

    def call(self, made: Any, inputs: Any, mask: Any, **masks: Any) -> Any:
        """The outputs without a cache."""
        raise NotImplementedError

    def call_with_cache(
        self, made: Any, inputs: Any, cache: Any, index: Any, mask: Any
    ) -> tuple[Any, Any]:
        raise NotImplementedError

    def as_model(self, made: Any) -> keras.Model:
        """A model that can be saved."""
        raise NotImplementedError


class LayerSubject(Subject):
    """A `CachedLayer` on inputs of shape `(batch, length, hidden_dim)`."""

    def __init__(self, *args: Any, hidden_dim: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_dim = hidden_dim

    def check_type(self, made: Any) -> None:
        if not isinstance(made, CachedLayer):
            raise TypeError(
                f"`{self.argument}` must return an `attention.CachedLayer`. It "
                f"returned {describe(made)}. For a Keras model made of cached "
                "layers, use `check_cached_model`."
            )

    def build(self, made: Any) -> None:
        if not made.built:
            # Symbolic: nothing is computed.
            made(keras.Input(batch_shape=(1, 2, self.hidden_dim)))

    def draw(self, rng: np.random.Generator, batch_size: int, length: int) -> Any:
        shape = (batch_size, length, self.hidden_dim)
        return rng.normal(size=shape).astype("float32")

    def create_cache(self, made: Any, batch_size: int, length: int) -> Any:
        return made.create_cache(batch_size, length)

    def grow_cache(self, made: Any, cache: Any, length: int) -> Any:
        return made.grow_cache(cache, length)

    def can_rewind(self, made: Any) -> Callable[[Any, int, int], bool]:
        return made.can_rewind

    def limit(self, made: Any) -> int | None:
        return made.max_sequence_length

    def call(self, made: Any, inputs: Any, mask: Any, **masks: Any) -> Any:
        return made(inputs, **self._padding(mask), **masks)

    def call_with_cache(
        self, made: Any, inputs: Any, cache: Any, index: Any, mask: Any
    ) -> tuple[Any, Any]:
        padding = self._padding(mask)
        return made(inputs, cache=cache, cache_update_index=index, **padding)

    def as_model(self, made: Any) -> keras.Model:
        # Of one length: a layer may loop over it.
        inputs = keras.Input((self.prefill_size, self.hidden_dim))
        return keras.Model(inputs, made(inputs))

    @staticmethod
    def _padding(mask: Any) -> dict[str, Any]:
        return {} if mask is None else {"padding_mask": mask}


class ModelSubject(Subject):
    """A Keras model of cached layers, with whatever inputs it has.

    Args:
        example: a pytree of arrays `(batch, length, ...)`, or `None`.
    """

    argument = "make_model"

    def __init__(self, *args: Any, example: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._example = example

    def check_type(self, made: Any) -> None:
        if not isinstance(made, keras.Model):
            raise TypeError(
                f"`{self.argument}` must return a `keras.Model` or an "
                f"`attention.CachedLayer`. It returned {describe(made)}."
            )

    def build(self, made: Any) -> None:
        self._inputs = input_specs(made, self._example)
        if not made.built:
            made(self.draw(np.random.default_rng(0), 1, 2))

    def draw(self, rng: np.random.Generator, batch_size: int, length: int) -> Any:
        return tree.map_structure(
            lambda spec: spec.draw(rng, batch_size, length), self._inputs
        )

    def _one_token(self) -> Any:
        return self.draw(np.random.default_rng(0), 1, 1)

    def create_cache(self, made: Any, batch_size: int, length: int) -> Any:
        return create_cache(made, batch_size, length, self._one_token())

    def grow_cache(self, made: Any, cache: Any, length: int) -> Any:
        return grow_cache(call_sites(made, self._one_token()), cache, length)

    def can_rewind(self, made: Any) -> Callable[[Any, int, int], bool]:
        # The call sites are looked for once, for many questions.
        return functools.partial(can_rewind, call_sites(made, self._one_token()))

    def limit(self, made: Any) -> int | None:
        return max_positions(call_sites(made, self._one_token()))

    def call(self, made: Any, inputs: Any, mask: Any, **masks: Any) -> Any:
        return made(self._masked(inputs, mask), training=False)

    def call_with_cache(
        self, made: Any, inputs: Any, cache: Any, index: Any, mask: Any
    ) -> tuple[Any, Any]:
        inputs = self._masked(inputs, mask)
        return call_with_cache(made, inputs, cache, index, padding_mask=mask)

    def as_model(self, made: Any) -> keras.Model:
        return made

    def _masked(self, inputs: Any, mask: Any) -> Any:
        """The inputs, with the mask in the place they have for it."""
        if mask is None:
            return inputs
        return tree.map_structure(
            lambda spec, x: ops.cast(mask, x.dtype) if spec.is_mask else x,
            self._inputs,
            inputs,
        )


def copy_weights(source: Any, target: Any) -> None:
    """Gives an object the weights of another, whatever their dtypes."""
    for old, new in zip(source.weights, target.weights, strict=True):
        new.assign(ops.cast(ops.convert_to_tensor(old), new.dtype))


def positional(outputs: Any, length: int) -> list[Any]:
    """The outputs that belong to positions: tensors `(batch, length, ...)`."""
    leaves = [x for x in tree.flatten(outputs) if is_tensor(x)]
    found = [x for x in leaves if len(x.shape) >= 2 and x.shape[1] == length]
    if not found:
        raise ValueError(
            f"For inputs of {length} tokens, an output must be of shape (batch, "
            f"{length}, ...). Received: {describe(outputs)}"
        )
    return found


def call_parameters(layer: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(layer.call).parameters)


def takes_padding_mask(made: Any) -> bool:
    """Whether it can be told what is padding; models are told by the scope."""
    return isinstance(made, keras.Model) or "padding_mask" in call_parameters(made)
