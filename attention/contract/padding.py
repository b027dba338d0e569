"""Helpers for layers whose inputs end in padding."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.contract.arguments import check_positive_int, describe
from attention.contract.sizes import static_size


def zero_padding(x: Any, padding_mask: Any) -> Any:
    """Puts zeros into padded tokens, whatever stands there.

    Args:
        x: tensor of shape `(batch, length, width)`.
        padding_mask: `None` or tensor `(batch, length)`, true for real tokens.
    """
    if padding_mask is None:
        return x
    return ops.where(ops.cast(padding_mask, "bool")[..., None], x, 0)


def last_tokens(history: Any, padding_mask: Any = None, count: int = 1) -> Any:
    """Returns the last real entries of each row.

    That is what a layer that looks back over `count` tokens, such as a token
    shift or a causal convolution, keeps as its cache.

    Args:
        history: tensor of shape `(batch, past + length, ...)`: what the layer
            kept of the past, and behind it the new tokens. The past holds at
            least `count` entries; for a sequence without one they are zeros.
        padding_mask: `None` or tensor of shape `(batch, length)`, true for the
            real ones of the new tokens, which are padded on the right. The past
            has no padding.
        count: int. How many entries to return.

    Returns:
        A tensor of shape `(batch, count, ...)`. A row of padding alone gets
        the end of its past.

    Raises:
        TypeError: if `count` is no integer.
        ValueError: if `history` has fewer entries than asked for, or
            `padding_mask` is not one of its last tokens.

    Example:

    >>> import numpy as np
    >>> from attention import last_tokens
    >>> past, new = np.array([[1, 2], [5, 6]]), np.array([[3, 4], [7, 0]])
    >>> history = np.concatenate([past, new], axis=1)
    >>> np.array(last_tokens(history, np.array([[1, 1], [1, 0]]), count=2)).tolist()
    [[3, 4], [6, 7]]
    """
    count = check_positive_int("count", count)
    rank = len(getattr(history, "shape", ()))
    size = static_size(history, 1)
    if rank < 2 or (size is not None and size < count):
        raise ValueError(
            "`history` must be of shape (batch, past + length, ...) and hold at "
            f"least count={count} entries of each row: put zeros, or what was kept, "
            f"in front of the new tokens. Received: history={describe(history)}"
        )
    if padding_mask is None:
        return history[:, -count:]
    _check_mask(padding_mask, history, count)
    real = ops.sum(ops.cast(padding_mask, "int32"), axis=1, keepdims=True)
    past = ops.shape(history)[1] - ops.shape(padding_mask)[1]
    # `(batch, count)`: no entry in front of the first one.
    index = past + real - count + ops.arange(count, dtype="int32")[None]
    index = ops.maximum(index, 0)
    index = ops.reshape(index, (-1, count, *[1] * (rank - 2)))
    return ops.take_along_axis(history, index, axis=1)


def _check_mask(padding_mask: Any, history: Any, count: int) -> None:
    """Says so when a mask is not one of the tokens at the end of `history`."""
    rows, tokens = static_size(padding_mask, 0), static_size(padding_mask, 1)
    batch, size = static_size(history, 0), static_size(history, 1)
    fits = len(getattr(padding_mask, "shape", ())) == 2
    if None not in (tokens, size):
        fits = fits and tokens + count <= size  # type: ignore[operator]
    if not fits or (None not in (rows, batch) and rows != batch):
        raise ValueError(
            "`padding_mask` must be of shape (batch, length) and mark the new "
            f"tokens, behind at least count={count} past entries in `history` "
            "(zeros where there is no past). Received: padding_mask="
            f"{describe(padding_mask)}, history={describe(history)}"
        )
