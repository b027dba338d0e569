"""Writing new tokens into a cache without moving what is in it."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops

from attention import tensorflow_gradients
from attention.cache_scope import cache_is_donated
from attention.validation import dtype_name, static_size

tensorflow_gradients.register()

# Up to this many rows are written one by one.
_MAX_SLICES = 16


def token_positions(cache_update_index: Any, length: Any) -> Any:
    """The positions of `length` tokens that follow the cached ones.

    Args:
        cache_update_index: `None` (no cache: start at 0), an int, an integer
            scalar tensor or an integer tensor of shape `(batch_size,)`.
        length: int or integer scalar tensor.

    Returns:
        An `int32` tensor of shape `(length,)`, or `(batch_size, length)` where
        rows stand at different positions.

    Example:

    >>> import numpy as np
    >>> from attention.cache_writes import token_positions
    >>> np.array(token_positions(np.array([0, 5]), 3)).tolist()
    [[0, 1, 2], [5, 6, 7]]
    """
    steps = ops.arange(length, dtype="int32")
    if cache_update_index is None or isinstance(cache_update_index, int):
        return steps + (cache_update_index or 0)
    index = ops.cast(cache_update_index, "int32")
    if len(index.shape) == 0:
        return steps + index
    return steps[None, :] + index[:, None]


def write_tokens(cache: Any, update: Any, index: Any, padding_mask: Any = None) -> Any:
    """Writes tokens to the slots of their positions.

    No other slot is read, copied or written: in a compiled loop the cache stays
    where it is in memory. On torch it is overwritten where the scope that
    handed it out was told so (`CacheScope(..., donate=True)`), else copied.

    Args:
        cache: tensor of shape `(batch, heads, capacity, dim)`.
        update: tensor of shape `(batch, heads, new, dim)`, `new <= capacity`.
        index: int, or integer tensor of shape `()` or `(batch,)`: the position
            of each row's first new token.
        padding_mask: `None` or boolean tensor of shape `(batch, new)`. Tokens
            for which it is false are written over no position before `index`,
            and neither are those beyond the capacity.

    Returns:
        The updated cache.

    Example:

    >>> import numpy as np
    >>> from attention.cache_writes import write_tokens
    >>> cache = np.zeros((2, 1, 4, 1), "float32")
    >>> update = np.ones((2, 1, 2, 1), "float32")
    >>> mask = np.array([[True, False], [True, True]])
    >>> cache = write_tokens(cache, update, np.array([0, 3], "int32"), mask)
    >>> np.array(cache)[:, 0, :, 0].tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    on_torch = keras.config.backend() == "torch"
    capacity, new = cache.shape[2], static_size(update, 2)
    if isinstance(index, int) and new is not None and index + new <= capacity:
        # Slots behind `index` are not live: what a padded token leaves there is
        # overwritten before a token can attend to it.
        if on_torch:
            return _write_in_place(cache, update, index)
        return ops.slice_update(cache, (0, 0, index, 0), update)
    positions = token_positions(index, ops.shape(update)[2])
    live = positions < capacity
    live = live if len(live.shape) == 2 else live[None]
    if padding_mask is not None:
        live = ops.logical_and(live, padding_mask)
    live = live[:, None, :, None]
    if on_torch:
        return _write_indexed(cache, update, positions, live)
    rows = static_size(cache, 0)
    if new is not None and len(positions.shape) == 1:
        return _write_slice(cache, update, positions[0], live)
    few = new is not None and rows is not None and rows <= _MAX_SLICES
    if rows is None or not few or _launches_kernels():
        return _scatter(cache, update, positions, live)
    for row in range(rows):
        part = slice(row, row + 1)
        start = positions[row, 0]
        cache = _write_slice(cache, update[part], start, live[part], row)
    return cache


def _write_slice(cache: Any, update: Any, start: Any, live: Any, row: int = 0) -> Any:
    """Writes rows that stand at one position; `row` is the first of them.

    A slice that reaches past the end is moved to fit, and its tokens with it:
    those that lie in front of them then write back what their slot holds.
    """
    new = update.shape[2]
    first = ops.minimum(start, cache.shape[2] - new)
    if new > 1:
        source = ops.arange(new, dtype="int32") - (start - first)
        live = ops.logical_and(
            ops.take(live, ops.maximum(source, 0), axis=2),
            ops.reshape(source >= 0, (-1, 1)),
        )
        update = ops.take(update, ops.maximum(source, 0), axis=2)
    corner = (row, 0, first, 0)
    shape = (ops.shape(update)[0], cache.shape[1], new, cache.shape[3])
    current = ops.slice(cache, corner, shape)
    return ops.slice_update(cache, corner, ops.where(live, update, current))


def _scatter(cache: Any, update: Any, positions: Any, live: Any) -> Any:
    """Writes many rows that stand at positions of their own.

    Tokens that are not to be written write back what their slot holds. Each
    has a slot of its own, as it wraps around past the end: two writes to one
    slot would come in an order nobody knows.
    """
    batch, heads, capacity, dim = ops.shape(cache)
    positions = positions if len(positions.shape) == 2 else positions[None]
    positions = ops.broadcast_to(positions, (batch, ops.shape(update)[2]))
    slots = ops.mod(positions, capacity)[:, None, :]
    rows = ops.arange(batch, dtype="int32")[:, None, None]
    head = ops.arange(heads, dtype="int32")[None, :, None]
    indices = ops.stack(
        [
            ops.reshape(ops.broadcast_to(x, ops.shape(update)[:3]), (-1,))
            for x in (rows, head, slots)
        ],
        axis=-1,
    )
    current = ops.take_along_axis(
        cache, ops.broadcast_to(slots[..., None], ops.shape(update)), axis=2
    )
    update = ops.reshape(ops.where(live, update, current), (-1, dim))
    return ops.scatter_update(cache, indices, update)


def _write_in_place(cache: Any, update: Any, index: int) -> Any:
    """Writes on torch, all rows at one known position."""
    cache = _own(cache)
    update = ops.convert_to_tensor(update, dtype=dtype_name(cache))
    cache[:, :, index : index + update.shape[2]] = update
    return cache


def _write_indexed(cache: Any, update: Any, positions: Any, live: Any) -> Any:
    """Writes on torch at positions that are in a tensor.

    No position is looked at, for which a GPU would have to be waited for.
    """
    import torch

    cache = _own(cache)
    update = ops.convert_to_tensor(update, dtype=dtype_name(cache))
    # As in `_scatter`: no two tokens have one slot.
    slots = torch.remainder(positions, cache.shape[2]).long()
    if slots.ndim == 1:
        current = cache[:, :, slots]
        cache[:, :, slots] = torch.where(live, update, current)
        return cache
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    # Indices around a slice put their axes in front: (batch, new, heads, dim).
    current = cache[rows, :, slots]
    update, live = update.transpose(1, 2), live.transpose(1, 2)
    cache[rows, :, slots] = torch.where(live, update, current)
    return cache


def _own(cache: Any) -> Any:
    """A torch tensor that may be overwritten."""
    cache = ops.convert_to_tensor(cache)
    if cache_is_donated() and not cache.requires_grad:
        return cache
    return cache.clone()


@functools.cache
def _launches_kernels() -> bool:
    """Whether each operation costs a launch, as on GPUs, so few are better."""
    devices = " ".join(keras.distribution.list_devices())
    return "gpu" in devices or "cuda" in devices
