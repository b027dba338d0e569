"""Positions of tokens, of padding, and of past and new keys together."""

from __future__ import annotations

from keras import ops

from attention.contract.segments import segment_positions
from attention.contract.types import Index, Mask, Tensor

# The position of padding: later than all queries, so that none attends to it, and far
# enough below the largest int32 that numbers can be added to it.
HIDDEN_POSITION = 2**30


def one_row_each(positions: Tensor, like: Tensor) -> Tensor:
    """Returns positions as `(batch, length)`, with the batch of `like`."""
    if len(positions.shape) == 2:
        return positions
    shape = (ops.shape(like)[0], ops.shape(positions)[0])
    return ops.broadcast_to(positions[None], shape)


def hide_padding(positions: Tensor, padding_mask: Mask | None) -> Tensor:
    """Returns the positions, with `HIDDEN_POSITION` for padded tokens."""
    if padding_mask is None:
        return positions
    return ops.where(padding_mask, positions, HIDDEN_POSITION)


def join_positions(past: Tensor, new: Tensor) -> Tensor:
    """Joins positions of past and new keys, `(length,)` or `(batch, length)` each."""
    like = next((x for x in (past, new) if len(x.shape) == 2), None)
    if like is not None:
        past, new = one_row_each(past, like), one_row_each(new, like)
    return ops.concatenate([past, new], axis=-1)


def token_positions(
    cache_update_index: Index | None,
    length: int | Tensor,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Returns the positions of the `length` tokens that follow the cached ones.

    Args:
        cache_update_index: `None` (no cache: start at 0), an int, an integer scalar
            tensor or an integer tensor of shape `(batch,)`.
        length: int or integer scalar tensor.
        segment_ids: `None` or integer tensor `(batch, length)`: positions count from
            the start of each document. Then there is no cache.

    Returns:
        An `int32` tensor of shape `(length,)`, or `(batch, length)` where rows are at
        positions of their own.

    Example:

    >>> import numpy as np
    >>> from attention.positions.arithmetic import token_positions
    >>> np.array(token_positions(np.array([0, 5]), 3)).tolist()
    [[0, 1, 2], [5, 6, 7]]
    """
    if segment_ids is not None:
        return segment_positions(segment_ids)
    steps = ops.arange(length, dtype="int32")
    if cache_update_index is None or isinstance(cache_update_index, int):
        return steps + (cache_update_index or 0)
    index = ops.cast(cache_update_index, "int32")
    if len(index.shape) == 0:
        return steps + index
    return steps[None, :] + index[:, None]
