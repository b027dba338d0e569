"""The scopes that carry caches to the layers of a model written once."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops, tree

from attention.contract.arguments import describe
from attention.contract.context import change_context, context
from attention.contract.padding import check_right_padded
from attention.contract.sizes import is_concrete, static_size, trace_state
from attention.contract.types import Cache, Index, Mask


class Scope:
    """The base of scopes, which are active between `__enter__` and `__exit__`.

    Every call of a `CachedLayer` without `cache=` is passed to `run(layer, call,
    inputs)`; `call` is the layer's own `__call__`, and runs outside of this scope so
    that inner layers don't use it. Nor do they use the padding mask of a scope around
    this one, which belongs to other tokens.
    """

    def __init__(self, padding_mask: Mask | None = None, **changes: Any) -> None:
        self._context = change_context(scope=self, padding_mask=padding_mask, **changes)

    def __enter__(self) -> Any:
        self._context.__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        self._context.__exit__(None, None, None)

    def run(self, layer: Any, call: Any, inputs: Any) -> Any:
        raise NotImplementedError

    def refuse(self, message: str) -> None:
        """Refuses a call that can have no cache."""
        raise ValueError(message)


_LOOP = (
    "(A model that calls a layer once for each time step, in a loop, has another "
    "number of cached calls for each length: call the layer once, on all steps.)"
)


class CacheScope(Scope):
    """Gives every cached layer called inside of it its slot of a cache.

    A `CachedLayer` that is called without `cache=` while a scope is active takes its
    cache from the scope and leaves the updated one there. Slots belong to call sites,
    in call order: a layer called twice has two slots. So any model made of cached
    layers is run with a cache without a line of caching code in it. A composite cached
    layer takes one slot and opens a scope of its own for its inner layers.

    The scope lives within one function, traced (`tf.function`, `jax.jit`) or eager.

    Args:
        cache: a tuple of slots, as returned by `attention.create_cache` or by
            the `cache` attribute of an earlier scope.
        cache_update_index: int, integer scalar tensor, or integer tensor of shape
            `(batch_size,)`. How many positions the cache has processed.
        padding_mask: `None` or tensor of shape `(batch_size, length)`, true for the
            real tokens of the inputs, which are padded on the right. Cached layers that
            the model calls without a mask use it.
        donate: bool. Whether the memory of the cache may be reused, as it is not used
            after the call: torch then overwrites it instead of copying it. In compiled
            functions of the other backends it makes no difference.

    Attributes:
        cache: after the scope is left, the updated cache: the same structure,
            shapes and dtypes as the one given.

    Raises:
        TypeError: if `cache` is not a tuple or list of slots.
        ValueError: if the layers called inside do not match the slots or the
            padding mask, or when `cache` is read before the scope was left.

    Example:

    >>> import keras, numpy as np
    >>> from keras import ops
    >>> from attention import CacheScope, MultiHeadAttention, create_cache
    >>> model = keras.Sequential(
    ...     [keras.Input((None, 8)), MultiHeadAttention(2), MultiHeadAttention(2)]
    ... )
    >>> cache = create_cache(model, batch_size=1, max_length=16)
    >>> x = np.random.normal(size=(1, 5, 8)).astype("float32")
    >>> with CacheScope(cache, 0) as scope:
    ...     prefilled = model(x[:, :4])
    >>> with CacheScope(scope.cache, 4) as scope:
    ...     step = model(x[:, 4:])
    >>> bool(ops.all(ops.isclose(step, model(x)[:, 4:], atol=1e-5)))
    True
    """

    def __init__(
        self,
        cache: Cache,
        cache_update_index: Index,
        padding_mask: Mask | None = None,
        donate: bool = False,
    ) -> None:
        if not isinstance(cache, (tuple, list)):
            raise TypeError(
                "`cache` must be the tuple of slots that `create_cache` (or an "
                f"earlier scope) returned. Received: cache={describe(cache)}"
            )
        if cache_update_index is None:
            raise ValueError(
                "`CacheScope` needs `cache_update_index`: how many positions "
                "the cache has processed (0 for a new cache). Received: "
                "cache_update_index=None"
            )
        super().__init__(_check_mask(padding_mask, cache), donated=bool(donate))
        self._slots = tuple(cache)
        self._index = cache_update_index
        self._updated: list[Any] = []
        # The layers that were called, and on how many positions, where it is known.
        self._lengths: list[tuple[Any, int | None]] = []
        self._entered = False
        self._complete = False

    def __enter__(self) -> Any:
        if self._entered:
            raise ValueError(
                "A `CacheScope` can be entered once, as its slots are taken in "
                "call order. Make a new one from `scope.cache`."
            )
        self._entered = True
        return super().__enter__()

    def run(self, layer: Any, call: Any, inputs: Any) -> Any:
        self._lengths.append((layer, _first_size(inputs, 1)))
        position = len(self._updated)
        slot = self._take_slot(layer, position)
        self._updated.append(slot)
        outputs, self._updated[position] = call(slot, self._index)
        return outputs

    def _take_slot(self, layer: Any, position: int) -> Any:
        if position >= len(self._slots):
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) is cached call "
                f"number {position + 1} in this scope, but the cache has "
                f"{len(self._slots)} slots. It was made for another model: "
                "create it with `create_cache` from the model you are calling. " + _LOOP
            )
        return self._slots[position]

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is not None:
            return
        self._check_complete()
        self._complete = True

    def _check_complete(self) -> None:
        if len(self._updated) != len(self._slots):
            raise ValueError(
                f"The cache has {len(self._slots)} slots, but "
                f"{len(self._updated)} cached layers were called in the scope. "
                "It was made for another model, or the model does not call the "
                "same layers each time. " + _LOOP
            )
        known = [x for x in self._lengths if x[1] is not None]
        for layer, length in known:
            first, before = known[0]
            if length != before:
                raise ValueError(
                    f"Layer '{layer.name}' ({type(layer).__name__}) was called on "
                    f"{length} positions, and layer '{first.name}' on {before}. A cache "
                    "holds one sequence. Layers of an encoder, which sees another, are "
                    'made with `sequence="source"`: they are called without a cache.'
                )

    @property
    def cache(self) -> tuple:
        if not self._complete:
            raise ValueError(
                "`scope.cache` can be read after the `with` block has ended "
                "without an error."
            )
        return tuple(self._updated)


class NewCacheScope(CacheScope):
    """A `CacheScope` whose slots are created, empty, at their first use.

    Each cached layer starts from a new cache at index 0, which saves the extra pass
    over the model that `create_cache` makes to find its call sites.

    Args:
        batch_size: int. The number of rows.
        max_length: int. How many positions each row can hold.
        padding_mask: as for `CacheScope`.
        source_length: int or `None`, which means `max_length`. How many positions the
            source has at most that cross-attention reads.

    Attributes:
        layers: after the scope is left, the cached layers, as `grow_cache` takes them.

    Example:

    >>> import keras, numpy as np
    >>> from attention import MultiHeadAttention, NewCacheScope
    >>> model = keras.Sequential([keras.Input((None, 8)), MultiHeadAttention(2)])
    >>> with NewCacheScope(batch_size=1, max_length=16) as scope:
    ...     outputs = model(np.zeros((1, 4, 8)))
    >>> scope.cache[0]["value"].shape[2], len(scope.layers)
    (16, 1)
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        padding_mask: Mask | None = None,
        source_length: int | None = None,
    ) -> None:
        mask = _check_mask(padding_mask, (), batch_size)
        # A cache that is made here is not used elsewhere.
        super().__init__((), 0, mask, donate=True)
        self._sizes = (batch_size, max_length, source_length)
        self.layers: list[Any] = []

    def _take_slot(self, layer: Any, position: int) -> Any:
        if not layer.built:
            # Building a model calls its layers, too: each would have two slots.
            raise ValueError(
                f"Layer '{layer.name}' has no weights yet, so its cache can't be "
                "created. Call the model once on an example of its inputs before "
                "it is called in a `NewCacheScope`."
            )
        self.layers.append(layer)
        return layer.create_cache(*self._sizes)

    def _check_complete(self) -> None:
        """Checks nothing: every slot was made by the call that used it."""


OR_NO_CACHE = (
    "; or, if the calls are not to see each other's tokens, take a layer that has "
    "no cache, such as `keras.layers.MultiHeadAttention`."
)


def _first_size(structure: Any, axis: int = 0) -> int | None:
    """Returns the size of an axis of the first tensor that has it, where it is known."""
    leaves = (x for x in tree.flatten(structure) if len(getattr(x, "shape", ())) > axis)
    return next((static_size(x, axis) for x in leaves), None)


def _check_mask(padding_mask: Mask, cache: Cache, batch_size: Any = None) -> Any:
    """Returns a scope's padding mask as booleans, and checks it."""
    if padding_mask is None:
        return None
    if isinstance(padding_mask, (list, tuple)):
        padding_mask = np.asarray(padding_mask)
    rows = batch_size or _first_size(cache)
    shape = tuple(getattr(padding_mask, "shape", ()))
    if len(shape) != 2 or (None not in (rows, shape[0]) and shape[0] != rows):
        raise ValueError(
            "`padding_mask` must be a boolean tensor of shape (batch, length) that "
            "marks the real tokens of the model's inputs. Received: padding_mask="
            f"{describe(padding_mask)}" + (f", for {rows} rows" if rows else "")
        )
    if isinstance(padding_mask, np.ndarray):
        check_right_padded(padding_mask)
    return ops.cast(padding_mask, "bool")


class RecordingScope(Scope):
    """Records the cached layers that are called, and runs them without a cache.

    It is the dry run for the other scopes, and refuses calls that can have no cache: in
    a mapped function, which no cache can leave, on other rows than the model's, or past
    the layer's `__call__`. If it is `strict`, such a call raises a `ValueError`.

    Attributes:
        layers: the cached layers in call order.
        problem: `None`, or why the calls can have no cache.
        whole_prompt: bool. Whether some call, at whatever depth, needs a whole
            prompt at once (see `CachedLayer.whole_prompt_arguments`).
    """

    def __init__(self, batch_size: int | None = None, strict: bool = True) -> None:
        # Rows that are made up hold no documents.
        super().__init__(dry_run=context().dry_run or self, segment_ids=None)
        self.layers: list[Any] = []
        self.problem: str | None = None
        self.whole_prompt = False
        self._strict = strict
        self._batch_size = batch_size
        self._trace: Any = None
        self._eager = False

    def __enter__(self) -> Any:
        # Calls that are not a dry run may be traced, by `jax.grad` for instance.
        if self._strict:
            self._trace = trace_state()
            self._eager = self._trace is None and is_concrete(ops.zeros(()))
        return super().__enter__()

    def run(self, layer: Any, call: Any, inputs: Any) -> Any:
        name = f"Layer '{layer.name}' ({type(layer).__name__})"
        rows = _first_size(inputs)
        if None not in (rows, self._batch_size) and rows != self._batch_size:
            self.refuse(
                f"{name} is called on {rows} rows, where the model has "
                f"{self._batch_size}. A cache holds one sequence for each row of "
                "the model, so a layer can't have one where another axis is "
                "folded into the batch, or the rows are split. Call it on the "
                "model's own rows" + OR_NO_CACHE
            )
        self.layers.append(layer)
        outputs = call(None, None)
        if self._strict and self._is_traced_alone(outputs):
            self.refuse(
                f"{name} is called inside of a function that is traced on its own: "
                "mapped (`vectorized_map`), looped (`scan`, `fori_loop`, an RNN) or "
                "compiled. Its cache can't leave that function, so it can't have one. "
                "Call it outside, on all steps at once, or in a Python loop"
                + OR_NO_CACHE
            )
        return outputs

    def _is_traced_alone(self, outputs: Any) -> bool:
        """Returns whether a call is in a function that this scope is not in."""
        if self._trace is not None:
            return trace_state() != self._trace
        first = next(iter(tree.flatten(outputs)), None)
        return self._eager and first is not None and not is_concrete(first)

    def refuse(self, message: str) -> None:
        self.problem = self.problem or message
        if self._strict:
            raise ValueError(message)
