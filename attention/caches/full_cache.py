"""The cache policy that keeps all tokens."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.caches.cache_policy import CachePolicy, token_axis
from attention.caches.writes import write_tokens
from attention.contract.sizes import static_size
from attention.contract.types import Cache, Mask, Tensor
from attention.positions.arithmetic import HIDDEN_POSITION


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class FullCache(CachePolicy):
    """Keeps every token, in the slot of its position.

    Example:

    >>> from attention import FullCache, MultiHeadAttention
    >>> layer = MultiHeadAttention(num_heads=2, key_dim=4, cache_policy=FullCache())
    >>> cache = layer.create_cache(batch_size=1, max_length=100)
    >>> {name: tuple(x.shape) for name, x in cache.items()}
    {'key': (1, 2, 4, 100), 'value': (1, 2, 100, 4)}
    """

    def slots(self, max_length: int) -> int:
        return max_length

    def positions(self, slots: int, index: Tensor) -> Tensor:
        positions = ops.arange(slots, dtype="int32")
        return ops.where(positions < index[..., None], positions, HIDDEN_POSITION)

    def write(
        self, cache: Cache, new: dict[str, Tensor], index: Tensor, padding_mask: Mask
    ) -> dict[str, Any]:
        slots = self.num_slots(cache)
        name = next(iter(new))
        count = static_size(new[name], token_axis(name))
        start = index if isinstance(index, int) and padding_mask is None else 0
        if count is not None and start + count > slots:
            raise ValueError(
                f"{count} tokens at cache_update_index={start} do not fit into a cache "
                f"of {slots} positions. Create it with a larger `max_length`, or grow "
                "it with `grow_cache`."
            )
        return {
            name: write_tokens(cache[name], x, index, padding_mask, token_axis(name))
            for name, x in new.items()
        }

    def write_and_read(
        self,
        cache: Cache,
        new: dict,
        index: Tensor,
        positions: Tensor,
        padding_mask: Mask,
    ) -> tuple[Any, Any, Any]:
        # No slot is overwritten: all that is seen is in the cache.
        written = self.write(cache, new, index, padding_mask)
        return written, written, ops.arange(self.num_slots(cache), dtype="int32")

    def place_scores(
        self, cache: Cache, past: Tensor, new: Tensor, index: Tensor, padding_mask: Mask
    ) -> Tensor:
        # Each weight is put where its key is in the cache.
        if past is None:
            past = ops.zeros((*ops.shape(new)[:3], self.num_slots(cache)), new.dtype)
        return write_tokens(past, new, index, padding_mask, axis=3)

    def can_rewind(self, cache: Cache, from_index: int, to_index: int) -> bool:
        # Slots after the index are hidden, and overwritten before they are seen.
        return True
