"""Attention to the filled slots of a large cache only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from attention.contract.sizes import is_concrete, static_size
from attention.positions.arithmetic import HIDDEN_POSITION
from attention.softmax.kernels import TokensFirst

# A cache is attended in so many sizes at most, of so many slots at least: each size
# is compiled, and less attention than this takes less time than choosing.
MAX_PARTS = 4
PART_SLOTS = 1024
MIN_QUERIES = 32


def attend_to_filled(
    attend: Callable[[tuple[Any, Any], Any, Any], Any],
    past: tuple[Any, Any],
    mask: Any,
    bias: Any,
    key_positions: Any,
) -> Any:
    """Attends to a cache as far as it is filled, rounded up to a part of it.

    A prompt is absorbed in chunks, and the first of them would attend to a whole
    cache of hidden slots. All rows attend to as much as the fullest one needs. A few
    queries, as in decoding, attend to all slots.

    Args:
        attend: called with keys and values of the past, a mask and a bias.
        past: keys and values as in a cache: `(batch, heads, key_dim, slots)`, or
            `TokensFirst`, and `(batch, heads, slots, value_dim)`. Slots are filled
            from the first one on.
        mask: boolean tensor `(batch or 1, 1, queries, slots + new)`.
        bias: `None`, or tensor `(..., queries, slots + new)`.
        key_positions: `int32` tensor `(slots + new,)` or `(batch, slots + new)`.
            Slots that are not filled are at `HIDDEN_POSITION`.

    Returns:
        What `attend` returns.
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
        def cut(x: Any) -> Any:
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
    """The first slots of keys and values."""
    key, value = past
    if isinstance(key, TokensFirst):
        return TokensFirst(key.keys[:, :, :size]), value[:, :, :size]
    return key[..., :size], value[:, :, :size]
