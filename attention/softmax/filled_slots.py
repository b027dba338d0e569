"""Attention to the filled slots of a large cache only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from attention.contract.sizes import is_concrete, static_size
from attention.contract.types import Mask, Tensor
from attention.positions.arithmetic import HIDDEN_POSITION
from attention.softmax.kernels import TokensFirst

# The largest number of parts, and the smallest number of slots in a part: each part is
# a branch that is compiled, and attention to fewer slots is faster than the choice.
MAX_PARTS = 4
PART_SLOTS = 1024
MIN_QUERIES = 32


def attend_to_filled(
    attend: Callable[[tuple[Any, Any], Any, Any], Any],
    past: tuple[Any, Any],
    mask: Mask,
    bias: Tensor,
    key_positions: Tensor,
) -> Any:
    """Returns `attend(past, mask, bias)` for the filled slots, rounded up to parts.

    A prompt is processed in chunks, and the first of them would attend to many empty
    slots. All rows attend to as many parts as the fullest row needs. A few queries, as
    in decoding, attend to all slots.

    Args:
        attend: called with keys and values of the past, a mask and a bias.
        past: keys and values as in a cache, filled from the first slot on.
        mask: boolean tensor of shape `(batch or 1, 1, queries, slots + new)`.
        bias: `None`, or tensor of shape `(..., queries, slots + new)`.
        key_positions: `int32` tensor of shape `(slots + new,)` or `(batch, slots +
            new)`. Empty slots are at `HIDDEN_POSITION`.
    """
    slots, queries = static_size(past[1], 2), static_size(mask, 2)
    if slots is None or queries is None or queries < MIN_QUERIES:
        return attend(past, mask, bias)
    parts = min(slots // PART_SLOTS, MAX_PARTS)
    if parts < 2:
        return attend(past, mask, bias)
    part = -(-slots // parts)
    seen = key_positions[..., :slots] < HIDDEN_POSITION
    filled = ops.max(ops.where(seen, ops.arange(1, slots + 1, dtype="int32"), 0))

    def branch(size: int) -> Callable[[], Any]:
        def cut(x: Tensor) -> Tensor:
            return ops.concatenate([x[..., :size], x[..., slots:]], axis=-1)

        def run() -> Any:
            return attend(
                _first(past, size), cut(mask), None if bias is None else cut(bias)
            )

        return run

    branches = [branch(min(i * part, slots)) for i in range(1, parts + 1)]
    choice = ops.maximum(filled - 1, 0) // part
    if is_concrete(choice):
        return branches[int(choice)]()
    return ops.switch(choice, branches)


def _first(past: tuple[Any, Any], size: int) -> tuple[Any, Any]:
    """Returns the first slots of keys and values."""
    key, value = past
    if isinstance(key, TokensFirst):
        return TokensFirst(key.keys[:, :, :size]), value[:, :, :size]
    return key[..., :size], value[:, :, :size]
