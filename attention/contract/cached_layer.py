"""The contract: one call signature for every layer that remembers a sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree

from attention.contract.arguments import describe
from attention.contract.checks import (
    check_cache,
    check_padding_mask,
    check_rewind_indices,
    check_updated_cache,
    standardize_index,
)
from attention.contract.context import change_context, context
from attention.contract.scopes import check_not_bypassed
from attention.contract.signatures import parameters, with_implicit_masks
from attention.contract.sizes import static_size


def _guarded(function: Callable) -> Callable:
    """A layer's `call` that can't be run past its `__call__` in a scope."""

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_not_bypassed(self)
        return function(self, *args, **kwargs)

    return call


class CachedLayer(keras.layers.Layer):
    """A layer whose outputs depend on the part of the sequence it saw before.

    Subclasses write one `call`, which trains without a cache and decodes with
    one:

    - `create_cache(batch_size, max_length)` returns a pytree of zeros of fixed
      shapes, batch axis first. `()` is a cache, too: of a layer that has no
      state, but needs the position.
    - `call(x, ..., padding_mask=None, cache=None, cache_update_index=None)`
      returns the outputs where `cache` is `None`, otherwise `(outputs, cache)`
      with the updated cache in the same structure, shapes and dtypes.

    The meaning of the arguments:

    - `cache_update_index`: how many positions of the sequence the cache has
      absorbed; the inputs hold the next ones. An int, an integer scalar tensor
      or an integer tensor of shape `(batch_size,)`: rows may stand at
      different positions. A zero cache at index 0 means no past. Each token is
      absorbed once. Without a cache, the inputs start at position 0.
    - `padding_mask`: `(batch_size, length)`, true for the real tokens of the
      inputs, which are padded on the right. A padded token is a no-op: it
      enters no state, is attended by no token and moves no position.
    - The whole sequence without a cache, one prefill, chunks of any sizes and
      one token at a time give the same outputs.
    - A smaller index than before takes the last positions back, if the layer
      says that it can: `can_rewind(cache, from_index, to_index)`.

    A cache belongs to the layer that made it; nobody else looks into it. It is
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
            cls.call = with_implicit_masks(_guarded(cls.call))  # type: ignore

    def __init__(self, **kwargs: Any) -> None:
        # Keras would cast the cache, too, at every call: `__call__` casts the
        # inputs instead.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True

    def create_cache(self, batch_size: int, max_length: int) -> Any:
        """Creates an empty cache.

        Args:
            batch_size: int. The number of rows.
            max_length: int. How many positions each row can hold.

        Returns:
            A pytree of zero tensors whose first axis is the batch.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `create_cache(batch_size, "
            "max_length)`: a pytree of zeros of fixed shapes, batch axis first."
        )

    def grow_cache(self, cache: Any, max_length: int) -> Any:
        """Copies a cache into a larger one.

        The default copies each tensor to the origin of its larger counterpart.
        A layer whose slots would move overrides it.

        Args:
            cache: a cache of this layer.
            max_length: int. How many positions each row can hold from now on.

        Returns:
            A cache with the same contents.

        Raises:
            ValueError: if `max_length` is smaller than what `cache` holds.
        """
        leaves = tree.flatten(cache)
        if not leaves:
            return cache
        larger = self.create_cache(int(leaves[0].shape[0]), max_length)

        def copy(old: Any, new: Any) -> Any:
            if any(a > b for a, b in zip(old.shape, new.shape)):
                raise ValueError(
                    f"`max_length={max_length}` is smaller than what the cache "
                    f"of layer '{self.name}' holds: a {describe(old)} does not "
                    f"fit into shape {tuple(new.shape)}."
                )
            if tuple(old.shape) == tuple(new.shape):
                return old
            return ops.slice_update(new, [0] * len(old.shape), old)

        return tree.map_structure(copy, cache, larger)

    def can_rewind(self, cache: Any, from_index: int, to_index: int) -> bool:
        """Whether the last positions can be taken back from a cache.

        If so, a caller may go on at `cache_update_index=to_index`, or at any
        index from there to `from_index`, each row at its own. The default is
        safe: only what has no state can. A layer whose queries see nothing at
        or behind the index but what was written since overrides it.

        Args:
            cache: a cache of this layer.
            from_index: int. How many positions it has absorbed: the largest
                number, where rows differ.
            to_index: int. How many of them are kept: the smallest number.

        Raises:
            ValueError: if not `from_index >= to_index >= 0`, both integers.
        """
        check_rewind_indices(from_index, to_index)
        return bool(from_index == to_index) or not tree.flatten(cache)

    def inner_layers(self) -> tuple[CachedLayer, ...]:
        """The cached layers whose slots this layer's cache is a tuple of."""
        return ()

    def __call__(
        self,
        *args: Any,
        cache: Any = None,
        cache_update_index: Any = None,
        **kwargs: Any,
    ) -> Any:
        def call(slot: Any, index: Any) -> Any:
            return self._call_with(args, kwargs, slot, index)

        if cache is not None:
            return call(cache, cache_update_index)
        if cache_update_index is not None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache_update_index` but "
                "without `cache`. Pass a cache made by `create_cache`, or "
                "neither of the two. Received: cache_update_index="
                f"{describe(cache_update_index)}"
            )
        scope = context().scope
        if scope is None:
            return call(None, None)
        return scope.run(self, call, (args, kwargs))

    def _call_with(self, args: tuple, kwargs: dict, cache: Any, index: Any) -> Any:
        args, kwargs = tree.map_structure(self._cast_input, (args, kwargs))
        names = parameters(type(self).call)
        given = {**dict(zip(names, args)), **kwargs}
        if given.get("cache") is not None:
            raise TypeError(
                f"Layer '{self.name}' takes `cache` and `cache_update_index` by "
                "keyword only: `layer(x, cache=cache, cache_update_index=index)`."
            )
        # What is sized by the batch is measured by the first argument.
        inputs = next(filter(_is_tensor, tree.flatten(given.get(names[0]))), None)
        dry_run, mask = context().dry_run, context().padding_mask
        if dry_run and any(
            given.get(x) is not None for x in self.whole_prompt_arguments
        ):
            dry_run.whole_prompt = True
        if given.get("padding_mask") is not None:
            mask = given["padding_mask"]
            check_padding_mask(self.name, mask, inputs)
        elif "padding_mask" in names[len(args) :]:
            mask = self._inherit_padding_mask(inputs, mask)
            if mask is not None:
                kwargs["padding_mask"] = mask
        elif cache is not None and mask is not None:
            raise TypeError(
                f"`call` of layer '{self.name}' ({type(self).__name__}) has no "
                "argument `padding_mask`, so padded tokens would enter its cache. "
                "Add `padding_mask=None` to it, and leave out the tokens for "
                "which the mask is false."
            )
        if self._has_position_limit:
            self._check_length(inputs, kwargs, cache, index)
        # What a layer knows to be padding holds for the layers it calls, too.
        # Composite layers see to it themselves, and in symbolic calls, in which
        # this mask is not yet the one that `call` gets, nobody else needs it.
        mask = None if isinstance(mask, keras.KerasTensor) else mask
        changes = {"scope": None, "padding_mask": mask}
        if isinstance(inputs, keras.KerasTensor) and keras.config.backend() == "torch":
            changes["made_up_sizes"] = True
        with change_context(**changes):
            return self._call_checked(args, kwargs, cache, index, inputs)

    def _call_checked(
        self, args: tuple, kwargs: dict, cache: Any, index: Any, inputs: Any
    ) -> Any:
        if cache is None:
            return super().__call__(*args, **kwargs)
        batch_size = static_size(inputs, 0)
        check_cache(self.name, cache, *self._cache_examples(), batch_size)
        if index is not None:
            kwargs["cache_update_index"] = standardize_index(index, batch_size)
        outputs = super().__call__(*args, cache=cache, **kwargs)
        check_updated_cache(self.name, cache, outputs)
        return outputs

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        # Traced, as without `compute_output_shape`: a shape describes no cache.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def compute_output_shape(self, input_shape: tuple) -> Any:
        """The shape of what the layer returns without a cache.

        Wrappers such as `keras.layers.SpectralNormalization` ask for it.

        Args:
            input_shape: tuple. The shape of the first argument.
        """
        x = keras.KerasTensor(input_shape, dtype=self.compute_dtype)
        with change_context(scope=None, made_up_sizes=True):
            outputs = self.compute_output_spec(x)
        return tree.map_structure(lambda x: tuple(x.shape), outputs)

    @property
    def _has_position_limit(self) -> bool:
        # Not asked of composite layers: the inner layer speaks for itself.
        return "max_sequence_length" in self.__dict__

    def _check_length(self, inputs: Any, kwargs: dict, cache: Any, index: Any) -> None:
        """Says so when tokens reach beyond the positions of this layer."""
        length = static_size(inputs, 1)
        known = index is None or isinstance(index, int)
        # With a cache, padded tokens may reach beyond the end.
        padded = cache is not None and kwargs.get("padding_mask") is not None
        if self.max_sequence_length is None or not known or padded or not length:
            return
        end = (index or 0) + length
        if end > self.max_sequence_length:
            raise ValueError(
                f"Layer '{self.name}' knows {self.max_sequence_length} positions, "
                f"but the tokens reach position {end}. Shorten the sequences (the "
                "preprocessor's `sequence_length`), or make the layer for more "
                f"positions. Received: {describe(inputs)} at "
                f"cache_update_index={index or 0}"
            )

    def _cast_input(self, x: Any) -> Any:
        if not _is_tensor(x):
            return x
        dtype = keras.backend.standardize_dtype(x.dtype)
        if "float" not in dtype or dtype == self.compute_dtype:
            return x
        return ops.cast(x, self.compute_dtype)

    def _inherit_padding_mask(self, inputs: Any, mask: Any) -> Any:
        """Returns the mask of the scope or layer this runs in, if it fits."""
        if mask is None:
            return None
        pairs = [(static_size(mask, i), static_size(inputs, i)) for i in (0, 1)]
        if all(None in pair or pair[0] == pair[1] for pair in pairs):
            return mask
        if context().scope is not None:
            raise ValueError(
                f"The scope's padding_mask={describe(mask)} does not fit the inputs "
                f"of layer '{self.name}': {describe(inputs)}. It must mark the real "
                "tokens of the model's inputs; give a layer that is called on other "
                "tokens a `padding_mask` of its own."
            )
        # A layer that runs on other rows or numbers of tokens has another mask.
        return None

    def _cache_examples(self) -> tuple[Any, Any]:
        """Two caches, from which `check_cache` reads what all share."""
        examples = self.__dict__.get("_cache_example_memo")
        if examples is None or examples.key != self.compute_dtype:
            examples = Untracked()
            examples.key = self.compute_dtype
            # Far enough apart for a layer that rounds its capacity up.
            longer = min(513, self.max_sequence_length or 513)
            examples.value = (
                tree.map_structure(_spec, self.create_cache(1, 1)),
                tree.map_structure(_spec, self.create_cache(2, longer)),
            )
            self._cache_example_memo = examples
        return examples.value


class Untracked:
    """Holds values on a layer without Keras taking them for its sublayers."""

    key: Any = None
    value: Any = None


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _spec(x: Any) -> keras.KerasTensor:
    return keras.KerasTensor(
        tuple(x.shape), dtype=keras.backend.standardize_dtype(x.dtype)
    )
