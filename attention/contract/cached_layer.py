"""The contract: one call signature for every layer that remembers a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree

from attention.contract.arguments import describe, dtype_name
from attention.contract.calls import (
    Untracked,
    in_context,
    keeping_sequence,
    parameters,
    taking_source_length,
)
from attention.contract.checks import (
    check_cache,
    check_padding_mask,
    check_rewind_indices,
    check_updated_cache,
    mask_fits,
    standardize_index,
)
from attention.contract.context import change_context, context
from attention.contract.remat import build_as_one, rematerialize_tensors
from attention.contract.sizes import is_tensor, static_size
from attention.contract.types import Cache, Index, Tensor


class CachedLayer(keras.layers.Layer):
    """A layer whose outputs depend on the part of the sequence it saw before.

    Subclasses write one `call`, which trains without a cache and decodes with one:

    - `create_cache(batch_size, max_length)` returns a pytree of zeros of fixed
      shapes, batch axis first. A layer that has no state but needs the position has
      the cache `()`.
    - `call(x, ..., padding_mask=None, cache=None, cache_update_index=None)`
      returns the outputs where `cache` is `None`, otherwise `(outputs, cache)`
      with the updated cache in the same structure, shapes and dtypes.

    The meaning of the arguments:

    - `cache_update_index`: how many positions of the sequence the cache has
      processed; the inputs hold the next ones. An int, an integer scalar tensor
      or an integer tensor of shape `(batch_size,)`: rows may be at different
      positions. A zero cache at index 0 means no past. Each token is processed
      once. Without a cache, the inputs start at position 0.
    - `padding_mask`: `(batch_size, length)`, true for the real tokens of the
      inputs, which are padded on the right. A padded token is a no-op: it
      enters no state, is attended by no token and moves no position.
    - `segment_ids`: of packed rows, `(batch_size, length)`: integers, one number for
      the tokens of one document. No other document in the row changes its outputs. A
      layer has this argument to be trained on packed rows (`SegmentScope`), never with
      a cache.
    - The whole sequence without a cache, one prefill, chunks of any sizes and
      one token at a time give the same outputs.
    - A smaller index than before takes the last positions back, if `can_rewind` says so.

    Only the layer that made a cache reads and writes its contents. A cache is
    created outside of the forward pass and never kept on the layer. A call
    without `cache=` inside a `CacheScope` takes its cache from the scope.

    Floating point inputs are cast to the layer's compute dtype, as everywhere
    in Keras; the cache never is. A recurrent state may be float32 while the
    layer computes in bfloat16. Such a layer's own weights are created with
    `add_weight(..., autocast=False)` where they must stay float32.

    Attributes:
        max_sequence_length: int or `None`. The largest number of positions
            the layer can represent; `None` where there is no limit.
        whole_prompt_arguments: tuple of str. The call arguments with which a call
            needs the whole prompt at once, because its tokens see later ones: a
            prefill is then not split into chunks.

    Args:
        sequence: `"target"`, or `"source"` for a layer of an encoder: in a `CacheScope`
            it is called without a cache, on the whole source.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Example:

    A layer that adds to each token the one before it.

    >>> import keras, numpy as np
    >>> from keras import ops
    >>> from attention import CachedLayer
    >>> class LagAndAdd(CachedLayer):
    ...     def build(self, inputs_shape):
    ...         self.width = inputs_shape[-1]
    ...     def create_cache(self, batch_size, max_length):
    ...         return ops.zeros((batch_size, 1, self.width), self.compute_dtype)
    ...     def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
    ...         last = ops.zeros_like(x[:, :1]) if cache is None else cache
    ...         seen = ops.concatenate([last, x], axis=1)
    ...         outputs = x + seen[:, :-1]
    ...         if cache is None:
    ...             return outputs
    ...         if padding_mask is None:
    ...             return outputs, seen[:, -1:]
    ...         real = ops.sum(ops.cast(padding_mask, "int32"), axis=1)
    ...         return outputs, ops.take_along_axis(seen, real[:, None, None], axis=1)
    >>> layer = LagAndAdd()
    >>> x = np.arange(6, dtype="float32").reshape(1, 3, 2)
    >>> full = layer(x)
    >>> cache = layer.create_cache(batch_size=1, max_length=3)
    >>> head, cache = layer(x[:, :2], cache=cache, cache_update_index=0)
    >>> tail, cache = layer(x[:, 2:], cache=cache, cache_update_index=2)
    >>> bool(ops.all(ops.isclose(ops.concatenate([head, tail], axis=1), full)))
    True
    >>> _, cache = layer(
    ...     x, padding_mask=np.array([[1, 1, 0]]), cache=cache, cache_update_index=3
    ... )
    >>> [float(v) for v in cache[0, 0]]  # the last real token
    [2.0, 3.0]

    Reference:

    - [keras-hub issue #1261](https://github.com/keras-team/keras-hub/issues/1261)
    """

    max_sequence_length: int | None = None
    whole_prompt_arguments: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "call" in vars(cls):
            cls.call = in_context(cls.call)  # type: ignore
        if "build" in vars(cls):
            cls.build = build_as_one(cls.build)  # type: ignore
        if "get_config" in vars(cls):
            cls.get_config = keeping_sequence(cls.get_config)  # type: ignore
        if "create_cache" in vars(cls):
            cls.create_cache = taking_source_length(cls.create_cache)  # type: ignore

    def __init__(
        self, *, autocast: bool = False, sequence: str = "target", **kwargs: Any
    ) -> None:
        if sequence not in ("target", "source"):
            raise ValueError(
                "`sequence` must be 'target', or 'source' for a layer of an encoder. "
                f"Received: sequence={describe(sequence)}"
            )
        if autocast:
            raise ValueError(
                "`autocast` of a cached layer must be False: Keras would cast the "
                "cache, too, at every call. Floating point inputs are cast without it."
            )
        super().__init__(autocast=False, **kwargs)
        self.sequence = sequence
        self.supports_masking = True

    @taking_source_length
    def create_cache(self, batch_size: int, max_length: int) -> Cache:
        """Creates an empty cache.

        Returns a pytree of zero tensors whose first axis is the batch, with room for
        `max_length` positions. A layer that attends to a source has a third argument,
        `source_length`; the others may be given one, too.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `create_cache(batch_size, "
            "max_length)`: a pytree of zeros of fixed shapes, batch axis first."
        )

    def grow_cache(self, cache: Cache, max_length: int) -> Cache:
        """Copies a cache into a larger one.

        The default copies each tensor to the origin of its larger counterpart. A layer
        whose slots would move overrides it. Raises a `ValueError` if `cache` is larger.
        """
        leaves = tree.flatten(cache)
        if not leaves:
            return cache
        larger = self.create_cache(int(leaves[0].shape[0]), max_length)

        def copy(old: Tensor, new: Tensor) -> Tensor:
            if any(a > b for a, b in zip(old.shape, new.shape)):
                raise ValueError(
                    f"The cache of layer '{self.name}' is larger than one for "
                    f"`max_length={max_length}`: a {describe(old)} does not fit into "
                    f"shape {tuple(new.shape)}."
                )
            if tuple(old.shape) == tuple(new.shape):
                return old
            return ops.slice_update(new, [0] * len(old.shape), old)

        return tree.map_structure(copy, cache, larger)

    def can_rewind(self, cache: Cache, from_index: int, to_index: int) -> bool:
        """Returns whether the last positions can be taken back from a cache.

        If so, a caller may continue at `cache_update_index=to_index`, or at any
        index from there to `from_index`, each row at an index of its own. By default
        only a layer without a state can. A layer overrides it if its queries see, at
        or after the index, only tokens that were written since.

        Args:
            cache: a cache of this layer.
            from_index: int. How many positions it has processed, at most.
            to_index: int. How many of them are kept, at least.

        Raises:
            ValueError: if not `from_index >= to_index >= 0`, both integers.
        """
        check_rewind_indices(from_index, to_index)
        return bool(from_index == to_index) or not tree.flatten(cache)

    def inner_layers(self) -> tuple[CachedLayer, ...]:
        """Returns the cached layers whose slots make up this layer's cache."""
        return ()

    def __call__(
        self,
        *args: Any,
        cache: Cache | None = None,
        cache_update_index: Index | None = None,
        **kwargs: Any,
    ) -> Any:
        if cache is None and cache_update_index is not None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache_update_index` but "
                "without `cache`. Pass a cache made by `create_cache`, or "
                "neither of the two. Received: cache_update_index="
                f"{describe(cache_update_index)}"
            )
        scope = context().scope
        if cache is not None or scope is None:
            return self._call_with(args, kwargs, cache, cache_update_index)
        if self.sequence == "source":
            # What the scope knows is of another sequence.
            with change_context(scope=None, padding_mask=None, segment_ids=None):
                return self._call_with(args, kwargs, None, None)

        def call(slot: Cache | None, index: Index | None) -> Any:
            return self._call_with(args, kwargs, slot, index)

        return scope.run(self, call, (args, kwargs))

    def _call_with(
        self, args: tuple, kwargs: dict, cache: Cache | None, index: Index | None
    ) -> Any:
        args, kwargs = tree.map_structure(self._prepare_input, (args, kwargs))
        names = parameters(type(self).call)
        given = {**dict(zip(names, args)), **kwargs}
        if given.get("cache") is not None:
            raise TypeError(
                f"Layer '{self.name}' takes `cache` and `cache_update_index` by "
                "keyword only: `layer(x, cache=cache, cache_update_index=index)`."
            )
        whole = [given.get(name) for name in self.whole_prompt_arguments]
        dry_run = context().dry_run
        if dry_run and any(x is not None for x in whole):
            dry_run.whole_prompt = True
        # The first argument has the sizes of the batch.
        inputs = next(filter(is_tensor, tree.flatten(given.get(names[0]))), None)
        mask = self._choose_padding_mask(given.get("padding_mask"), inputs)
        if "padding_mask" in names[len(args) :]:
            kwargs["padding_mask"] = mask
        elif cache is not None and mask is not None and "padding_mask" not in names:
            raise TypeError(
                f"`call` of layer '{self.name}' ({type(self).__name__}) has no "
                "argument `padding_mask`, so padded tokens would enter its cache. "
                "Add `padding_mask=None` to it, and leave out the tokens for "
                "which the mask is false."
            )
        segments = self._choose_segment_ids(given.get("segment_ids"), inputs, cache)
        if segments is not None:
            kwargs["segment_ids"] = segments
        self._check_length(inputs, mask, cache, index)
        changes: dict[str, Any] = {"scope": None, "running": None}
        if isinstance(inputs, keras.KerasTensor) and keras.config.backend() == "torch":
            changes["made_up_sizes"] = True
        with change_context(**changes):
            if cache is None:
                return super().__call__(*args, **kwargs)
            batch_size = static_size(inputs, 0)
            check_cache(self.name, cache, *self._cache_examples(), batch_size)
            if index is not None:
                kwargs["cache_update_index"] = standardize_index(index, batch_size)
            outputs = super().__call__(*args, cache=cache, **kwargs)
            check_updated_cache(self.name, cache, outputs)
            return outputs

    def _choose_padding_mask(
        self, given: Tensor | None, inputs: Tensor
    ) -> Tensor | None:
        """Returns the mask given, or that of the enclosing call or scope."""
        if given is not None:
            check_padding_mask(self.name, given, inputs)
            return given
        mask = context().padding_mask
        if mask is None or mask_fits(mask, inputs):
            return mask
        if context().scope is not None:
            raise ValueError(
                f"The scope's padding_mask={describe(mask)} does not fit the inputs "
                f"of layer '{self.name}': {describe(inputs)}. It must mark the real "
                "tokens of the model's inputs; give a layer that is called on other "
                "tokens a `padding_mask` of its own."
            )
        return None

    def _choose_segment_ids(
        self, given: Tensor | None, inputs: Tensor, cache: Cache | None
    ) -> Tensor | None:
        """Returns the documents of packed rows, if the context has some and not the call."""
        around = context().segment_ids
        if given is not None or around is None or not mask_fits(around, inputs):
            return None
        if cache is not None:
            raise ValueError(
                f"Layer '{self.name}' was called with a cache in a `SegmentScope`. A "
                "cache holds one document in each row; give each its own row."
            )
        if "segment_ids" in parameters(type(self).call):
            return around
        raise TypeError(
            f"`call` of layer '{self.name}' ({type(self).__name__}) has no argument "
            "`segment_ids`, so documents that share a row would change each other's "
            "outputs. Add `segment_ids=None` to it, and forget what came before "
            "wherever the number changes; or train with a document in each row."
        )

    def rematerialized_call(
        self, layer_call: Callable, *args: Any, **kwargs: Any
    ) -> Callable:
        if kwargs.get("cache") is not None:
            return layer_call
        return rematerialize_tensors(
            self, super().rematerialized_call, layer_call, args, kwargs
        )

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        # Traced, as without `compute_output_shape`: a shape describes no cache.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def compute_output_shape(self, input_shape: tuple) -> Any:
        """Returns the shape of the outputs without a cache, for an `input_shape`.

        `keras.layers.SpectralNormalization` needs it.
        """
        x = keras.KerasTensor(input_shape, dtype=self.compute_dtype)
        with change_context(scope=None, made_up_sizes=True):
            outputs = self.compute_output_spec(x)
        return tree.map_structure(lambda x: tuple(x.shape), outputs)

    def _check_length(
        self,
        inputs: Tensor,
        padding_mask: Tensor | None,
        cache: Cache | None,
        index: Index | None,
    ) -> None:
        """Raises an error if tokens reach beyond the positions of this layer."""
        length, limit = static_size(inputs, 1), self.max_sequence_length
        known = index is None or isinstance(index, int)
        # With a cache, padded tokens may reach beyond the end.
        padded = cache is not None and padding_mask is not None
        if limit is None or not known or padded or not length:
            return
        if (index or 0) + length > limit:
            raise ValueError(
                f"Layer '{self.name}' knows {limit} positions, but the tokens reach "
                f"position {(index or 0) + length}. Shorten the sequences (the "
                "preprocessor's `sequence_length`), or make the layer for more "
                f"positions. Received: {describe(inputs)} at "
                f"cache_update_index={index or 0}"
            )

    def _prepare_input(self, x: Any) -> Any:
        if not is_tensor(x):
            return x
        if isinstance(x, keras.KerasTensor) and x.sparse:
            # Keras takes a symbolic tensor times a number for sparse.
            x = ops.convert_to_tensor(x, sparse=False)
        dtype = keras.backend.standardize_dtype(x.dtype)
        if "float" not in dtype or dtype == self.compute_dtype:
            return x
        return ops.cast(x, self.compute_dtype)

    def _cache_examples(self) -> tuple[Any, Any]:
        """Returns two caches, from which `check_cache` infers the form of all."""
        examples = self.__dict__.get("_cache_example_memo")
        if examples is None or examples.key != self.compute_dtype:
            # Lengths that differ also for a layer that rounds its capacity up.
            longer = min(513, self.max_sequence_length or 513)
            specs = tree.map_structure(
                lambda x: keras.KerasTensor(tuple(x.shape), dtype_name(x)),
                (self.create_cache(1, 1), self.create_cache(2, longer)),
            )
            examples = Untracked(self.compute_dtype, specs)
            self._cache_example_memo = examples
        return examples.value
