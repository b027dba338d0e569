"""Writes new tokens into a cache without moving the rest of it."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import keras
from keras import ops

from attention.contract.arguments import dtype_name
from attention.contract.context import context
from attention.contract.sizes import static_size
from attention.contract.types import Cache, Index, Mask, Tensor
from attention.positions.arithmetic import token_positions

# Up to this many rows are written one by one.
_MAX_SLICES = 32
# Larger than any finite output, of whatever dtype.
_MORE_THAN_ANY = 3.4e38


def write_tokens(
    cache: Cache,
    update: Tensor,
    index: Index,
    padding_mask: Mask | None = None,
    axis: int = 2,
) -> Tensor:
    """Returns the cache with tokens written to the slots of their positions.

    No other slot is read, copied or written: in a compiled loop the cache stays
    where it is in memory. On torch it is overwritten if the scope that it came from
    allows that (`CacheScope(..., donate=True)`), and copied if not.

    Args:
        cache: tensor of shape `(batch, heads, capacity, dim)`, or `(batch,
            heads, dim, capacity)`.
        update: tensor of shape `(batch, heads, new, dim)`, or `(batch, heads, dim,
            new)`, with `new <= capacity` tokens.
        index: int, or integer tensor of shape `()` or `(batch,)`: the position of
            each row's first new token.
        padding_mask: `None` or boolean tensor of shape `(batch, new)`. Padded tokens
            and those beyond the capacity change no slot before `index`.
        axis: int, 2 or 3. The axis of the tokens.

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
        # Slots after `index` are not in use: what a padded token leaves there is
        # overwritten before any token attends to it.
        if on_torch:
            cache = _own(cache)
            update = ops.convert_to_tensor(update, dtype=dtype_name(cache))
            cache.narrow(axis, index, new).copy_(update)
            return cache
        return ops.slice_update(cache, _corner(0, index, axis), update)
    positions = token_positions(index, ops.shape(update)[axis])
    live = positions < capacity
    live = live if len(live.shape) == 2 else live[None]
    if padding_mask is not None:
        live = ops.logical_and(live, padding_mask)
    # (batch or 1, 1, new, 1) or (batch or 1, 1, 1, new)
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


def _corner(row: int, start: Index, axis: int) -> tuple:
    return (row, 0, start, 0) if axis == 2 else (row, 0, 0, start)


def _write_slice(
    cache: Cache, update: Tensor, start: Index, live: Mask, axis: int, row: int = 0
) -> Tensor:
    """Writes rows that are at one position; `row` is the first of them.

    A slice that reaches past the end is moved back to fit. Its tokens keep their
    slots; in slots before them, what is there is written again.
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


def _scatter(
    cache: Cache, update: Tensor, positions: Tensor, live: Mask, axis: int
) -> Tensor:
    """Writes many rows that are at positions of their own.

    For tokens that are not live, what is in their slot is written again. Past the
    end they wrap around, so that no two tokens have one slot: the order of two writes
    to one slot is not defined.
    """
    shape = ops.shape(update)
    positions = positions if len(positions.shape) == 2 else positions[None]
    positions = ops.broadcast_to(positions, (shape[0], shape[axis]))
    slots = ops.mod(positions, ops.shape(cache)[axis])
    slots = slots[:, None, :, None] if axis == 2 else slots[:, None, None, :]
    current = ops.take_along_axis(cache, ops.broadcast_to(slots, shape), axis=axis)
    update = ops.where(live, update, current)
    # With tokens on axis 2, whole vectors of the last axis are scattered.
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


def _write_indexed(
    cache: Cache, update: Tensor, positions: Tensor, live: Mask, axis: int
) -> Tensor:
    """Writes on torch at positions that are in a tensor.

    It reads no position, which would have to wait for a GPU.
    """
    import torch

    result = _own(cache)
    update = ops.convert_to_tensor(update, dtype=dtype_name(result))
    # (batch, heads, tokens, dim) in both layouts
    cache, update, live = (x.movedim(axis, 2) for x in (result, update, live))
    # As in `_scatter`, no two tokens have one slot.
    slots = torch.remainder(positions, cache.shape[2]).long()
    if slots.ndim == 1:
        cache[:, :, slots] = torch.where(live, update, cache[:, :, slots])
        return result
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    # Indices around a slice come first: (batch, new, heads, dim).
    update, live = update.transpose(1, 2), live.transpose(1, 2)
    cache[rows, :, slots] = torch.where(live, update, cache[rows, :, slots])
    return result


def _own(cache: Cache) -> Tensor:
    """Returns a torch tensor that may be overwritten."""
    cache = ops.convert_to_tensor(cache)
    if context().donated and not cache.requires_grad:
        return cache
    return cache.clone()


def computed_after(update: Tensor, outputs: Tensor) -> Tensor:
    """Returns `update`, made to depend on `outputs`: XLA then computes them first.

    Outputs that read a cache must be computed before it is overwritten in place. XLA
    does not find this order by itself, it copies the cache, but it follows an order
    that values prescribe: this compares the outputs to a number that none exceeds.
    """
    if keras.config.backend() == "torch":
        return update
    largest = ops.cast(ops.max(outputs), "float32")
    return ops.where(largest > _MORE_THAN_ANY, ops.zeros_like(update), update)


@functools.cache
def _launches_kernels() -> bool:
    """Returns whether each operation costs a launch, as on GPUs."""
    devices = " ".join(keras.distribution.list_devices())
    return "gpu" in devices or "cuda" in devices


def _register_gradient() -> None:
    """Registers the gradient of `slice_update`, so that it flows through caches.

    JAX and torch have it. TensorFlow has the operation without a gradient, so that
    training on tokens after a cached prefix would fail.
    """
    if keras.config.backend() != "tensorflow":
        return
    import tensorflow as tf

    def gradient(op: Any, upstream: Tensor) -> tuple[Any, Any, None]:
        _, update, start = op.inputs
        size = tf.shape(update)
        # As in the operation, a slice that does not fit is moved back.
        start = tf.clip_by_value(start, 0, tf.shape(upstream) - size)
        zeros = tf.zeros_like(update)
        kept = keras.ops.slice_update(upstream, start, zeros)
        return kept, tf.slice(upstream, start, size), None

    # It may be registered already, perhaps by a newer TensorFlow.
    with contextlib.suppress(KeyError):
        tf.RegisterGradient("XlaDynamicUpdateSlice")(gradient)


_register_gradient()
