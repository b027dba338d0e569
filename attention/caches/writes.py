"""Writing new tokens into a cache without moving what is in it."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops

from attention.caches import tensorflow_gradients
from attention.contract.arguments import dtype_name
from attention.contract.context import context
from attention.contract.sizes import static_size
from attention.positions.arithmetic import token_positions

tensorflow_gradients.register()

# Up to this many rows are written one by one.
_MAX_SLICES = 32


# Only infinity is larger, in any dtype that outputs may have.
_MORE_THAN_ANY = 3.4e38


def write_tokens(
    cache: Any, update: Any, index: Any, padding_mask: Any = None, axis: int = 2
) -> Any:
    """Writes tokens to the slots of their positions.

    No other slot is read, copied or written: in a compiled loop the cache stays
    where it is in memory. On torch it is overwritten where the scope that
    handed it out was told so (`CacheScope(..., donate=True)`), else copied.

    Args:
        cache: tensor of shape `(batch, heads, capacity, dim)`, or `(batch,
            heads, dim, capacity)`.
        update: tensor of as many axes, with `new <= capacity` tokens.
        index: int, or integer tensor of shape `()` or `(batch,)`: the position
            of each row's first new token.
        padding_mask: `None` or boolean tensor of shape `(batch, new)`. Tokens
            for which it is false are written over no position before `index`,
            and neither are those beyond the capacity.
        axis: int, 2 or 3. The axis of the tokens.

    Returns:
        The updated cache.

    Example:

    >>> import numpy as np
    >>> from attention.caches.writes import write_tokens
    >>> cache = np.zeros((2, 1, 4, 1), "float32")
    >>> update = np.ones((2, 1, 2, 1), "float32")
    >>> mask = np.array([[True, False], [True, True]])
    >>> cache = write_tokens(cache, update, np.array([0, 3], "int32"), mask)
    >>> np.array(cache)[:, 0, :, 0].tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    on_torch = keras.config.backend() == "torch"
    capacity, new = cache.shape[axis], static_size(update, axis)
    if isinstance(index, int) and new is not None and index + new <= capacity:
        # Slots behind `index` are not live: what a padded token leaves there is
        # overwritten before a token can attend to it.
        if on_torch:
            return _write_in_place(cache, update, index, axis)
        return ops.slice_update(cache, _corner(0, index, axis), update)
    positions = token_positions(index, ops.shape(update)[axis])
    live = positions < capacity
    live = live if len(live.shape) == 2 else live[None]
    if padding_mask is not None:
        live = ops.logical_and(live, padding_mask)
    live = live[:, None, :, None] if axis == 2 else live[:, None, None, :]
    if on_torch:
        return _write_indexed(cache, update, positions, live, axis)
    rows = static_size(cache, 0)
    if new is not None and len(positions.shape) == 1:
        return _write_slice(cache, update, positions[0], live, axis)
    few = new is not None and rows is not None and rows <= _MAX_SLICES
    if rows is None or not few or _launches_kernels():
        return _scatter(cache, update, positions, live, axis)
    for row in range(rows):
        part = slice(row, row + 1)
        start = positions[row, 0]
        cache = _write_slice(cache, update[part], start, live[part], axis, row)
    return cache


def _corner(row: int, start: Any, axis: int) -> tuple:
    return (row, 0, start, 0) if axis == 2 else (row, 0, 0, start)


def _write_slice(
    cache: Any, update: Any, start: Any, live: Any, axis: int, row: int = 0
) -> Any:
    """Writes rows that stand at one position; `row` is the first of them.

    A slice that reaches past the end is moved to fit, and its tokens with it:
    those that lie in front of them then write back what their slot holds.
    """
    new = update.shape[axis]
    first = ops.minimum(start, cache.shape[axis] - new)
    if new > 1:
        source = ops.arange(new, dtype="int32") - (start - first)
        inside = ops.reshape(source >= 0, (-1, 1) if axis == 2 else (-1,))
        source = ops.maximum(source, 0)
        live = ops.logical_and(ops.take(live, source, axis=axis), inside)
        update = ops.take(update, source, axis=axis)
    corner = _corner(row, first, axis)
    shape = (ops.shape(update)[0], *update.shape[1:])
    current = ops.slice(cache, corner, shape)
    return ops.slice_update(cache, corner, ops.where(live, update, current))


def _scatter(cache: Any, update: Any, positions: Any, live: Any, axis: int) -> Any:
    """Writes many rows that stand at positions of their own.

    Tokens that are not to be written write back what their slot holds. Each
    has a slot of its own, as it wraps around past the end: two writes to one
    slot would come in an order nobody knows.
    """
    shape = ops.shape(update)
    positions = positions if len(positions.shape) == 2 else positions[None]
    positions = ops.broadcast_to(positions, (shape[0], shape[axis]))
    slots = ops.mod(positions, ops.shape(cache)[axis])
    slots = slots[:, None, :, None] if axis == 2 else slots[:, None, None, :]
    current = ops.take_along_axis(cache, ops.broadcast_to(slots, shape), axis=axis)
    update = ops.where(live, update, current)
    # Where the axis of the tokens is the last but one, whole vectors are moved.
    axes = axis + 1
    places = [
        ops.reshape(
            ops.arange(shape[i], dtype="int32"), [-1 if j == i else 1 for j in range(4)]
        )
        for i in range(axes)
    ]
    places[axis] = slots
    indices = [
        ops.broadcast_to(x[..., 0] if axes < 4 else x, shape[:axes]) for x in places
    ]
    indices = ops.stack([ops.reshape(x, (-1,)) for x in indices], axis=-1)
    return ops.scatter_update(cache, indices, ops.reshape(update, (-1, *shape[axes:])))


def _write_in_place(cache: Any, update: Any, index: int, axis: int) -> Any:
    """Writes on torch, all rows at one known position."""
    cache = _own(cache)
    update = ops.convert_to_tensor(update, dtype=dtype_name(cache))
    cache.narrow(axis, index, update.shape[axis]).copy_(update)
    return cache


def _write_indexed(
    cache: Any, update: Any, positions: Any, live: Any, axis: int
) -> Any:
    """Writes on torch at positions that are in a tensor.

    No position is looked at, for which a GPU would have to be waited for.
    """
    import torch

    result = _own(cache)
    update = ops.convert_to_tensor(update, dtype=dtype_name(result))
    # Tokens in front of what each is made of, whatever the layout.
    cache, update, live = (x.movedim(axis, 2) for x in (result, update, live))
    # As in `_scatter`: no two tokens have one slot.
    slots = torch.remainder(positions, cache.shape[2]).long()
    if slots.ndim == 1:
        cache[:, :, slots] = torch.where(live, update, cache[:, :, slots])
        return result
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    # Indices around a slice put their axes in front: (batch, new, heads, dim).
    update, live = update.transpose(1, 2), live.transpose(1, 2)
    cache[rows, :, slots] = torch.where(live, update, cache[rows, :, slots])
    return result


def _own(cache: Any) -> Any:
    """A torch tensor that may be overwritten."""
    cache = ops.convert_to_tensor(cache)
    if context().donated and not cache.requires_grad:
        return cache
    return cache.clone()


def computed_after(update: Any, outputs: Any) -> Any:
    """Makes sure that `update` is written after `outputs` were computed.

    Outputs that were read from a cache have to be, before it is overwritten
    where it is. XLA would rather copy the cache than find such an order by
    itself, but follows one that the values prescribe: this compares the outputs
    to a number that none exceeds.

    Args:
        update: a floating point tensor.
        outputs: a floating point tensor.

    Returns:
        `update`.
    """
    if keras.config.backend() == "torch":
        return update
    largest = ops.cast(ops.max(outputs), "float32")
    return ops.where(largest > _MORE_THAN_ANY, ops.zeros_like(update), update)


@functools.cache
def _launches_kernels() -> bool:
    """Whether each operation costs a launch, as on GPUs, so few are better."""
    devices = " ".join(keras.distribution.list_devices())
    return "gpu" in devices or "cuda" in devices
