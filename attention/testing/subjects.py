"""Objects under test: cached layers, and Keras models made of cached layers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.layers import Layer

from attention.contract.arguments import check_positive_int, describe
from attention.contract.cached_layer import CachedLayer
from attention.contract.cached_model import (
    call_sites,
    call_with_cache,
    can_rewind,
    create_cache,
    grow_cache,
    max_positions,
    symbolic_inputs,
)
from attention.contract.inner_layers import all_layers
from attention.contract.types import Cache, DType, Index, Mask
from attention.testing.backends import dtype_policy, to_numpy
from attention.testing.running import Checked

# Noise that is added to all trainable weights, so that what starts at zero (a
# bias, a gate) takes part in the outputs.
_NOISE = 0.1


class Subject(Checked):
    """Makes layers to check, under a dtype policy, and calls them all in the same way.

    `length` is that of the sequences and of the caches. Models: `ModelSubject`.
    """

    argument, kind = "make_layer", CachedLayer
    # The difference allowed beyond rounding.
    tolerance = 0.0

    def __init__(
        self,
        make: Callable,
        batch_size: int,
        length: int,
        dtype: DType,
        seed: int,
        hidden_dim: int = 16,
    ) -> None:
        if not callable(make) or isinstance(make, Layer):
            raise TypeError(
                f"`{self.argument}` must be a function without arguments that makes "
                f"a new one, such as `lambda: MyLayer(4)`. Received: "
                f"{self.argument}={describe(make)}"
            )
        self.make, self.dtype, self.seed = make, dtype, seed
        self.batch_size = check_positive_int("batch_size", batch_size)
        self.length = check_positive_int("max_length", length)
        self.hidden_dim = check_positive_int("hidden_dim", hidden_dim)
        # A third of the sequence is the prefill, the rest follows in other ways.
        self.prefill_size = max(1, length // 3)

    def new(self, dtype: DType = None, like: Layer | None = None) -> Any:
        """Makes a built object, always with the same weights, or with those of another.

        `dtype=None` means the dtype policy of the check.
        """
        with dtype_policy(dtype or self.dtype):
            keras.utils.set_random_seed(self.seed)
            made = self.make()
            if not isinstance(made, self.kind):
                raise TypeError(
                    f"`{self.argument}` must return an `attention.CachedLayer`, or "
                    "for `check_cached_model` a `keras.Model`. It returned "
                    f"{describe(made)}."
                )
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

    def sample(self, seed: int) -> Any:
        """Returns random inputs over the whole length: a pytree of arrays."""
        rng = np.random.default_rng([self.seed, seed])
        return self.draw(rng, self.batch_size, self.length)

    def build(self, made: Layer) -> None:
        if not made.built:
            # Symbolic: nothing is computed.
            made(keras.Input(batch_shape=(1, 2, self.hidden_dim)))

    def draw(self, rng: np.random.Generator, batch_size: int, length: int) -> Any:
        shape = (batch_size, length, self.hidden_dim)
        return rng.normal(size=shape).astype("float32")

    def sites(self) -> tuple[CachedLayer, ...]:
        """Returns the cached layers that are called."""
        return (self.made,)

    def create_cache(self, made: Layer, batch_size: int, length: int) -> Cache:
        return made.create_cache(batch_size, length)

    def grow_cache(self, made: Layer, cache: Cache, length: int) -> Cache:
        return made.grow_cache(cache, length)

    def can_rewind(self, made: Layer) -> Callable[[Cache, int, int], bool]:
        return made.can_rewind

    def limit(self, made: Layer) -> int | None:
        """Returns the largest number of positions it can represent."""
        return made.max_sequence_length

    def call(self, made: Layer, inputs: Any, mask: Mask, **masks: Any) -> Any:
        """Returns the outputs without a cache."""
        return made(inputs, **self._padding(mask), **masks)

    def call_with_cache(
        self, made: Layer, inputs: Any, cache: Cache, index: Index, mask: Mask
    ) -> tuple[Any, Cache]:
        padding = self._padding(mask)
        return made(inputs, cache=cache, cache_update_index=index, **padding)

    def as_model(self, made: Layer) -> keras.Model:
        """Returns a model that can be saved."""
        # Of one length: a layer may loop over it.
        inputs = keras.Input((self.prefill_size, self.hidden_dim))
        return keras.Model(inputs, made(inputs))

    def complete(self, inputs: Any) -> Any:
        """Returns inputs with what is given at each call besides."""
        return inputs

    def takes(self, argument: str) -> bool:
        """Whether the layer's `call` has an argument."""
        return argument in inspect.signature(self.made.call).parameters

    @staticmethod
    def _padding(mask: Mask) -> dict[str, Any]:
        return {} if mask is None else {"padding_mask": mask}


class ModelSubject(Subject):
    """Makes Keras models of cached layers, whose inputs are like an example, if any.

    `sources` are inputs that are given whole at each call, the same for all rows.
    """

    argument, kind = "make_model", keras.Model

    def __init__(
        self, *args: Any, example: Any = None, sources: dict[str, Any] | None = None
    ) -> None:
        super().__init__(*args)
        self._example = example
        self._sources = {k: np.asarray(x) for k, x in (sources or {}).items()}

    def build(self, made: Layer) -> None:
        self._inputs = _input_specs(made, self._example, self._sources)
        if not made.built:
            made(self.complete(self.draw(np.random.default_rng(0), 1, 2)))

    def draw(self, rng: np.random.Generator, batch_size: int, length: int) -> Any:
        return tree.map_structure(
            lambda spec: spec.draw(rng, batch_size, length), self._inputs
        )

    def _sites(self, made: Layer) -> tuple[CachedLayer, ...]:
        return call_sites(
            made, self.complete(self.draw(np.random.default_rng(0), 1, 1))
        )

    def sites(self) -> tuple[CachedLayer, ...]:
        return self._sites(self.made)

    def create_cache(self, made: Layer, batch_size: int, length: int) -> Cache:
        example = self.complete(self.draw(np.random.default_rng(0), 1, 1))
        longest = max((x.shape[1] for x in self._sources.values()), default=None)
        return create_cache(made, batch_size, length, example, longest)

    def grow_cache(self, made: Layer, cache: Cache, length: int) -> Cache:
        return grow_cache(self._sites(made), cache, length)

    def can_rewind(self, made: Layer) -> Callable[[Cache, int, int], bool]:
        # The call sites are looked for once, for many questions.
        return functools.partial(can_rewind, self._sites(made))

    def limit(self, made: Layer) -> int | None:
        return max_positions(self._sites(made))

    def call(self, made: Layer, inputs: Any, mask: Mask, **masks: Any) -> Any:
        return made(self._masked(inputs, mask), training=False)

    def call_with_cache(
        self, made: Layer, inputs: Any, cache: Cache, index: Index, mask: Mask
    ) -> tuple[Any, Cache]:
        inputs = self._masked(inputs, mask)
        return call_with_cache(made, inputs, cache, index, padding_mask=mask)

    def as_model(self, made: Layer) -> keras.Model:
        return made

    def takes(self, argument: str) -> bool:
        # The scope of a cache tells the layers what is padding.
        return argument == "padding_mask"

    def _masked(self, inputs: Any, mask: Mask) -> Any:
        """Returns the inputs, with the mask in the place they have for it."""

        def put(spec: _InputSpec, x: Any) -> Any:
            return ops.cast(mask, x.dtype) if spec.is_mask else x

        if mask is not None:
            inputs = tree.map_structure(put, self._inputs, inputs)
        return self.complete(inputs)

    def complete(self, inputs: Any) -> Any:
        """Returns inputs with the sources, of which each row has the same."""
        if not self._sources:
            return inputs
        first = tree.flatten(inputs)[0]
        sources = {k: np.repeat(x, len(first), 0) for k, x in self._sources.items()}
        if not isinstance(first, np.ndarray):
            # Arrays and tensors together are no inputs.
            sources = tree.map_structure(ops.convert_to_tensor, sources)
        return {**inputs, **sources}


@dataclasses.dataclass
class _InputSpec:
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


def _input_specs(model: keras.Model, example: Any, sources: dict[str, Any]) -> Any:
    """Returns what the inputs of a model look like: a pytree of `_InputSpec`s.

    `sources` are left out.
    """
    structure = symbolic_inputs(model) if example is None else example
    if sources:
        missing = set(sources) - set(structure if isinstance(structure, dict) else ())
        if missing:
            raise ValueError(
                f"The model has no inputs named {sorted(missing)}, of which `sources` are. "
                f"Its inputs are {describe(structure)}"
            )
        structure = {k: x for k, x in structure.items() if k not in sources}
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
        specs.append(_InputSpec(tuple(x.shape)[2:], dtype, low, high, is_mask))
    return tree.pack_sequence_as(structure, specs)


def _vocabulary_size(model: keras.Model, name: str) -> int:
    size = getattr(model, "vocabulary_size", None)
    if size is None:
        layers, kind = all_layers(model), keras.layers.Embedding
        size = min((x.input_dim for x in layers if isinstance(x, kind)), default=None)
    if size is None:
        raise ValueError(
            f"It is not known which integers the input '{name}' of "
            f"'{model.name}' takes: it has no `vocabulary_size` and no "
            "`keras.layers.Embedding`. Pass `inputs`, an example of the inputs."
        )
    return int(size)


def copy_weights(source: Any, target: Any) -> None:
    """Gives an object the weights of another, whatever their dtypes."""
    for old, new in zip(source.weights, target.weights, strict=True):
        new.assign(ops.cast(ops.convert_to_tensor(old), new.dtype))
