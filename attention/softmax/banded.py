"""Sequences in blocks, for attention whose cost grows with the window only."""

from __future__ import annotations

from typing import Any

from keras import ops

# Smaller blocks would be too many products of too little each.
MIN_BLOCK = 64


def block_size(length: Any, window: int | None) -> Any:
    """The size of the blocks to compute windowed self-attention in.

    Args:
        length: the length of the sequence: an int, or an integer tensor where it
            is known when it runs only.
        window: how many positions a query sees, or `None` for all.

    Returns:
        At least the window, so that a block sees its neighbours and no others;
        `None` where blocks would save nothing. A tensor where `length` is one.
    """
    if window is None:
        return None
    size = max(window, MIN_BLOCK)
    if not isinstance(length, int):
        return ops.minimum(size, length)
    return size if length > 2 * size else None


def cut(x: Any, count: Any, size: Any, fill: int = 0) -> Any:
    """Cuts `(batch, length, ...)` into `(batch, count, size, ...)`.

    Args:
        x: tensor of shape `(batch, length, ...)`.
        count: int, or a tensor where the length is known when it runs only. The
            number of pieces. One is as long as the sequence.
        size: the length of each.
        fill: what the last one is filled up with.
    """
    # Padding by a tensor forgets all sizes.
    rest = x.shape[2:]
    if not isinstance(count, int) or (count > 1 and x.shape[1] < count * size):
        missing = count * size - ops.shape(x)[1]
        width = [[0, 0], [0, missing], *([[0, 0]] * len(rest))]
        x = ops.pad(x, width, constant_values=fill)
    return ops.reshape(x, (-1, count, size, *rest))


class Blocks:
    """A batch of sequences as a larger batch of blocks of them.

    Args:
        size: int, or tensor. The size of a block.
        length: likewise. The length of the sequences.
        causal: bool. Whether a block sees the block before it, or the one behind
            it, too.

    Example:

    >>> import numpy as np
    >>> from attention.softmax.banded import Blocks
    >>> blocks = Blocks(size=2, length=5, causal=True)
    >>> x = np.arange(1, 6)[None]
    >>> np.array(blocks.queries(x)).tolist()
    [[1, 2], [3, 4], [5, 0]]
    >>> np.array(blocks.keys(x)).tolist()
    [[0, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 0]]
    >>> np.array(blocks.join(blocks.queries(x))).tolist()
    [[1, 2, 3, 4, 5]]
    """

    def __init__(self, size: Any, length: Any, causal: bool) -> None:
        self.size, self.length, self.causal = size, length, causal
        self.count = -(-length // size)

    def queries(self, x: Any) -> Any:
        """Cuts `(batch, length, ...)` into `(batch * blocks, size, ...)`."""
        return self._merge(cut(x, self.count, self.size))

    def keys(self, x: Any, fill: int = 0) -> Any:
        """Likewise, but each block comes with its neighbours.

        Args:
            x: tensor of shape `(batch, length, ...)`.
            fill: what stands in front of the sequence and behind it.
        """
        x = cut(x, self.count, self.size, fill)
        edge = ops.full_like(x[:, :1], fill)
        parts = [ops.concatenate([edge, x[:, :-1]], axis=1), x]
        if not self.causal:
            parts.append(ops.concatenate([x[:, 1:], edge], axis=1))
        return self._merge(ops.concatenate(parts, axis=2))

    def join(self, x: Any) -> Any:
        """Makes sequences of blocks of queries again."""
        x = ops.reshape(x, (-1, self.count * self.size, *x.shape[2:]))
        return x[:, : self.length]

    @staticmethod
    def _merge(x: Any) -> Any:
        return ops.reshape(x, (-1, *ops.shape(x)[2:]))
