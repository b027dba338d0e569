"""Sequences in blocks, for sliding-window attention of linear cost."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.contract.padding import cut
from attention.contract.types import Tensor

# With smaller blocks there are too many small products.
MIN_BLOCK = 64


def block_size(length: Any, window: int | None) -> Any:
    """Returns the size of blocks for sliding-window self-attention.

    It is at least the window, so that a block sees only its neighbours, and a tensor
    where `length` is one. `None` where blocks would save nothing.
    """
    if window is None:
        return None
    size = max(window, MIN_BLOCK)
    if not isinstance(length, int):
        return ops.minimum(size, length)
    return size if length > 2 * size else None


class Blocks:
    """Arranges a batch of sequences as a larger batch of blocks of a size.

    The size and the length may be tensors. A block sees itself and the block before it,
    and if it is not causal the block after it.
    """

    def __init__(self, size: Any, length: Any, causal: bool) -> None:
        self.size, self.length, self.causal = size, length, causal
        self.count = -(-length // size)

    def queries(self, x: Tensor) -> Tensor:
        """Returns `(batch, length, ...)` as `(batch * blocks, size, ...)`."""
        return self._merge(cut(x, self.count, self.size))

    def keys(self, x: Tensor, fill: int = 0) -> Tensor:
        """Returns blocks with their neighbours: `(batch * blocks, 2 or 3 * size, ...)`.

        `fill` is the value before and after the sequence.
        """
        x = cut(x, self.count, self.size, fill)
        edge = ops.full_like(x[:, :1], fill)
        parts = [ops.concatenate([edge, x[:, :-1]], axis=1), x]
        if not self.causal:
            parts.append(ops.concatenate([x[:, 1:], edge], axis=1))
        return self._merge(ops.concatenate(parts, axis=2))

    def join(self, x: Tensor) -> Tensor:
        """Returns blocks of queries as `(batch, length, ...)` again."""
        x = ops.reshape(x, (-1, self.count * self.size, *x.shape[2:]))
        return x[:, : self.length]

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return ops.reshape(x, (-1, *ops.shape(x)[2:]))
