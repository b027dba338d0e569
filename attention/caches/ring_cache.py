"""The cache policy of a sliding window."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.caches.cache_policy import CachePolicy, token_axis
from attention.caches.writes import write_tokens
from attention.contract.arguments import check_positive_int, describe
from attention.contract.sizes import static_size
from attention.contract.types import Cache, Mask, Tensor
from attention.positions.arithmetic import HIDDEN_POSITION


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RingCache(CachePolicy):
    """Keeps the last `window` tokens and the first `keep` ones.

    A later token is in slot `keep + (position - keep) % window`. Which position a
    slot holds follows from how many tokens came. The cache has a slot for each position
    until there are so many, and then never grows.

    First tokens that stay are what trained models rest their attention on where
    nothing else matters (attention sinks). Their positions are those of the sequence:
    StreamingLLM, which counts positions within its cache, is the same where only
    distances within the window matter.

    Args:
        window: int. How many positions a query sees, itself included.
        keep: int. How many of the first positions it sees besides.

    Raises:
        TypeError: if an argument is no integer.
        ValueError: if `window` is not positive, or `keep` is negative.

    Example:

    >>> from attention import RingCache, RotaryAttention
    >>> policy = RingCache(window=64, keep=4)
    >>> layer = RotaryAttention(num_heads=2, key_dim=8, cache_policy=policy)
    >>> layer.create_cache(batch_size=1, max_length=100_000)["value"].shape[2]
    68

    References:

    - [Beltagy et al., 2020](https://arxiv.org/abs/2004.05150)
    - [Xiao et al., 2023](https://arxiv.org/abs/2309.17453) (`keep`)
    """

    def __init__(self, window: int, keep: int = 0) -> None:
        self.window = check_positive_int("window", window)
        if isinstance(keep, bool) or not isinstance(keep, (int, np.integer)):
            raise TypeError(
                f"`keep` must be an integer. Received: keep={describe(keep)}"
            )
        if keep < 0:
            raise ValueError(f"`keep` can't be negative. Received: keep={keep}")
        self.keep = int(keep)
        self.reach = None if keep else self.window

    def slots(self, max_length: int) -> int:
        # The slot of a position is the same in a smaller ring that it fits into.
        return min(self.keep + self.window, max_length)

    def positions(self, slots: int, index: Tensor) -> Tensor:
        keep = min(self.keep, slots)
        # (..., slots - keep): the last position before `index` of each slot of the ring.
        last = index[..., None] - self.keep - 1
        slot = ops.arange(slots - keep, dtype="int32")
        positions = last - ops.mod(last - slot, self.window)
        positions = ops.where(positions >= 0, positions + self.keep, HIDDEN_POSITION)
        if not keep:
            return positions
        first = ops.arange(keep, dtype="int32")
        first = ops.where(first < index[..., None], first, HIDDEN_POSITION)
        return ops.concatenate([first, positions], axis=-1)

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        near = ops.abs(key_positions - query_positions) < self.window
        if not self.keep:
            return near
        return ops.logical_or(near, key_positions < self.keep)

    def write(
        self, cache: Cache, new: dict[str, Tensor], index: Tensor, padding_mask: Mask
    ) -> dict[str, Any]:
        name = next(iter(new))
        if static_size(new[name], token_axis(name)) != 1:
            return super().write(cache, new, index, padding_mask)
        # One token: no other slot is touched.
        if isinstance(index, int) and padding_mask is None:
            slot: Any = self.keep + (index - self.keep) % self.window
            slot = index if index < self.keep else slot
        else:
            # Here the slot after the index is in use, so padding must not be written
            # there: only at an index in a tensor does `write_tokens` heed that.
            index = ops.cast(index, "int32")
            slot = self.keep + ops.mod(index - self.keep, self.window)
            slot = ops.where(index < self.keep, index, slot) if self.keep else slot
        return {
            name: write_tokens(cache[name], x, slot, padding_mask, token_axis(name))
            for name, x in new.items()
        }

    def can_rewind(self, cache: Cache, from_index: int, to_index: int) -> bool:
        # Until a position is dropped that is seen again from `to_index` on.
        return from_index <= self.keep + self.window or from_index - to_index <= 1

    def get_config(self) -> dict[str, Any]:
        return {"window": self.window, "keep": self.keep}
