"""The cache policy that stores 8 bits."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.caches.cache_policy import (
    CachePolicy,
    check_cache_policy,
    token_axis,
)
from attention.caches.full_cache import FullCache
from attention.contract.types import Cache, DType, Mask, Tensor

_LARGEST = 127.0


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class QuantizedCache(CachePolicy):
    """Stores what another cache policy keeps, in a quarter of float32's bytes.

    Each head of each token has a scale of its own: its largest number becomes 127.
    New tokens are seen as they will be read, so that outputs do not depend on how
    a sequence is cut into calls.

    Args:
        policy: the `CachePolicy` of what is kept; `None` means `FullCache()`.

    Example:

    >>> from attention import MultiHeadAttention, QuantizedCache, RingCache
    >>> policy = QuantizedCache(RingCache(4))
    >>> layer = MultiHeadAttention(num_heads=2, key_dim=8, cache_policy=policy)
    >>> cache = layer.create_cache(batch_size=1, max_length=100)
    >>> sorted(cache), tuple(cache["value"].shape)
    (['key', 'key_scale', 'value', 'value_scale'], (1, 2, 4, 8))
    """

    def __init__(self, policy: CachePolicy | None = None) -> None:
        self.policy = check_cache_policy(policy) or FullCache()
        self.reach = self.policy.reach

    def slots(self, max_length: int) -> int:
        return self.policy.slots(max_length)

    def positions(self, slots: int, index: Tensor) -> Tensor:
        return self.policy.positions(slots, index)

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return self.policy.visible(query_positions, key_positions)

    def can_rewind(self, cache: Cache, from_index: int, to_index: int) -> bool:
        return self.policy.can_rewind(cache, from_index, to_index)

    def create(
        self,
        batch_size: int,
        max_length: int,
        sizes: dict[str, tuple[int, int]],
        dtype: str,
    ) -> dict[str, Any]:
        scales = {_scale_of(name): (heads, 1) for name, (heads, _) in sizes.items()}
        cache = self.policy.create(batch_size, max_length, {**sizes, **scales}, dtype)
        return {
            name: ops.cast(x, "int8" if name in sizes else "float32")
            for name, x in cache.items()
        }

    def write(
        self, cache: Cache, new: dict[str, Tensor], index: Tensor, padding_mask: Mask
    ) -> dict[str, Any]:
        return self.policy.write(cache, _encode(new), index, padding_mask)

    def read(self, cache: Cache, dtype: DType) -> dict[str, Any]:
        return {
            name: dequantize(x, cache[_scale_of(name)], dtype)
            for name, x in cache.items()
            if _scale_of(name) in cache
        }

    def stored(self, new: Tensor) -> Tensor:
        return dequantize(*quantize(new, -1), new.dtype)

    def write_and_read(
        self,
        cache: Cache,
        new: dict,
        index: Tensor,
        positions: Tensor,
        padding_mask: Mask,
    ) -> tuple[Any, Any, Any]:
        written, seen, positions = self.policy.write_and_read(
            cache, _encode(new), index, positions, padding_mask
        )
        return written, self.read(seen, next(iter(new.values())).dtype), positions

    def place_scores(
        self, cache: Cache, past: Tensor, new: Tensor, index: Tensor, padding_mask: Mask
    ) -> Tensor:
        return self.policy.place_scores(cache, past, new, index, padding_mask)

    def get_config(self) -> dict[str, Any]:
        return {"policy": keras.saving.serialize_keras_object(self.policy)}


def _scale_of(name: str) -> str:
    return f"{name}_scale"


def _encode(new: dict[str, Tensor]) -> dict[str, Any]:
    encoded = {}
    for name, x in new.items():
        # The axis of a head's numbers is the other one of the last two.
        encoded[name], encoded[_scale_of(name)] = quantize(x, 5 - token_axis(name))
    return encoded


def quantize(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Returns `x` rounded to `int8`, and `float32` scales that share an axis."""
    x = ops.cast(x, "float32")
    scale = ops.max(ops.abs(x), axis=axis, keepdims=True) / _LARGEST
    # Zeros stay zeros, whatever they are divided by.
    divisor = ops.where(scale > 0, scale, 1.0)
    return ops.cast(ops.round(x / divisor), "int8"), scale


def dequantize(numbers: Tensor, scale: Any, dtype: str) -> Tensor:
    """Returns the numbers that `quantize` has rounded."""
    return ops.cast(ops.cast(numbers, "float32") * scale, dtype)
