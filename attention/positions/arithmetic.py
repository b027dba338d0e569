"""Arithmetic of positions: of tokens, slots and padding."""

from __future__ import annotations

from typing import Any

from keras import ops

# Later than all queries, and far enough from the largest int32 to be added to.
HIDDEN_POSITION = 2**30


def one_row_each(positions: Any, like: Any) -> Any:
    """Positions as `(batch, length)`, whether or not the rows share them.

    Args:
        positions: `int32` tensor of shape `(length,)` or `(batch, length)`.
        like: a tensor with a batch axis in front.
    """
    if len(positions.shape) == 2:
        return positions
    shape = (ops.shape(like)[0], ops.shape(positions)[0])
    return ops.broadcast_to(positions[None], shape)


def hide_padding(positions: Any, padding_mask: Any) -> Any:
    """Positions of tokens, `HIDDEN_POSITION` for padding if there is a mask."""
    if padding_mask is None:
        return positions
    return ops.where(padding_mask, positions, HIDDEN_POSITION)


def join_positions(past: Any, new: Any) -> Any:
    """The positions of past and new keys, `(length,)` or `(batch, length)` each."""
    like = next((x for x in (past, new) if len(x.shape) == 2), None)
    if like is not None:
        past, new = one_row_each(past, like), one_row_each(new, like)
    return ops.concatenate([past, new], axis=-1)


def is_zero(index: Any) -> bool:
    """Whether a cache is known to have absorbed nothing."""
    return isinstance(index, int) and index == 0


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
    >>> from attention.positions.arithmetic import token_positions
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
