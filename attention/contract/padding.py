"""Helpers for layers whose inputs end in padding."""

from __future__ import annotations

from keras import ops

from attention.contract.arguments import check_positive_int, describe
from attention.contract.context import context
from attention.contract.sizes import is_concrete, static_size
from attention.contract.types import Index, Mask, Tensor


def check_right_padded(padding_mask: Tensor) -> None:
    """Raises a `ValueError` if real tokens come after padded ones.

    That is known of arrays and of tensors that are not part of what is traced. Within a
    scope, which has the mask of the tokens that its cache gets, nothing is checked.
    """
    if context().scope is not None or not is_concrete(padding_mask):
        return
    real = ops.convert_to_numpy(padding_mask).astype(bool)
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError(
            "`padding_mask` marks real tokens after padded ones. Rows must be padded "
            "on the right, 1, ..., 1, 0, ..., 0: the first token is at position 0. "
            f"Received: padding_mask={describe(padding_mask)}"
        )


def zero_padding(x: Tensor, padding_mask: Mask) -> Tensor:
    """Returns `(batch, length, width)` with zeros for the padded tokens."""
    if padding_mask is None:
        return x
    return ops.where(ops.cast(padding_mask, "bool")[..., None], x, 0)


def last_tokens(
    history: Tensor, padding_mask: Mask | None = None, count: int = 1
) -> Tensor:
    """Returns the last real entries of each row.

    It makes the cache of a layer that looks back over `count` tokens, such as a token
    shift or a causal convolution.

    Args:
        history: tensor of shape `(batch, past + length, ...)`: the cached past and
            after it the new tokens. The past holds at least `count` entries, or zeros.
        padding_mask: `None` or tensor of shape `(batch, length)`, true for the
            real ones of the new tokens, padded on the right. The past has no padding.
        count: int. How many entries to return.

    Returns:
        A tensor of shape `(batch, count, ...)`. For a row of padding only, it is the
        end of the past.

    Raises:
        TypeError: if `count` is not an integer.
        ValueError: if `history` has fewer entries, or `padding_mask` does not fit it.

    Example:

    >>> import numpy as np
    >>> from attention import last_tokens
    >>> past, new = np.array([[1, 2], [5, 6]]), np.array([[3, 4], [7, 0]])
    >>> history = np.concatenate([past, new], axis=1)
    >>> np.array(last_tokens(history, np.array([[1, 1], [1, 0]]), count=2)).tolist()
    [[3, 4], [6, 7]]
    """
    count = check_positive_int("count", count)
    rank, size = len(getattr(history, "shape", ())), static_size(history, 1)
    if rank < 2 or (size is not None and size < count):
        raise ValueError(
            "`history` must be of shape (batch, past + length, ...) and hold at "
            f"least count={count} entries of each row: put the cached past, or zeros, "
            f"before the new tokens. Received: history={describe(history)}"
        )
    if padding_mask is None:
        return history[:, -count:]
    _check_mask(padding_mask, history, count)
    real = ops.sum(ops.cast(padding_mask, "int32"), axis=1, keepdims=True)
    past = ops.shape(history)[1] - ops.shape(padding_mask)[1]
    # (batch, count)
    index = past + real - count + ops.arange(count, dtype="int32")[None]
    index = ops.maximum(index, 0)
    index = ops.reshape(index, (-1, count, *[1] * (rank - 2)))
    return ops.take_along_axis(history, index, axis=1)


def _check_mask(padding_mask: Mask, history: Tensor, count: int) -> None:
    """Raises a `ValueError` if a mask does not fit the end of `history`."""
    rows, tokens = static_size(padding_mask, 0), static_size(padding_mask, 1)
    batch, size = static_size(history, 0), static_size(history, 1)
    fits = len(getattr(padding_mask, "shape", ())) == 2
    if None not in (tokens, size):
        fits = fits and tokens + count <= size  # type: ignore[operator]
    if not fits or (None not in (rows, batch) and rows != batch):
        raise ValueError(
            "`padding_mask` must be of shape (batch, length) and mark the new "
            f"tokens, after at least count={count} past entries in `history` "
            "(zeros where there is no past). Received: padding_mask="
            f"{describe(padding_mask)}, history={describe(history)}"
        )


def cut(x: Tensor, count: Index, size: Index, fill: int = 0) -> Tensor:
    """Cuts `(batch, length, ...)` into `(batch, count, size, ...)`, the last filled up.

    `count` is a tensor where the length is known only when the graph runs. If it is 1,
    the piece is the whole sequence.
    """
    # Static sizes are lost when padding by a tensor.
    rest = x.shape[2:]
    if not isinstance(count, int) or (count > 1 and x.shape[1] < count * size):
        missing = count * size - ops.shape(x)[1]
        width = [[0, 0], [0, missing], *([[0, 0]] * len(rest))]
        x = ops.pad(x, width, constant_values=fill)
    return ops.reshape(x, (-1, count, size, *rest))
