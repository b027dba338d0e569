"""Caches in 8 bits."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.caches.full_cache import FullCache

_LARGEST = 127.0


class QuantizedCache(FullCache):
    """Stores what another cache policy stores, in a quarter of float32's bytes.

    Each head of each token has a scale of its own: its largest number becomes 127.
    New tokens are seen as they will be read, so that outputs do not depend on how
    a sequence is cut into calls.

    Args:
        axes: as for `FullCache`.
        policy: the cache policy that says where tokens are kept, for the tensors
            of `with_scales(axes)`.
    """

    def __init__(self, axes: dict[str, int], policy: FullCache) -> None:
        super().__init__(axes)
        self.policy = policy

    def create(
        self,
        batch_size: int,
        max_length: int,
        sizes: dict[str, tuple[int, int]],
        dtype: str,
    ) -> dict[str, Any]:
        """Returns zeros: `int8` tensors, and `float32` scales."""
        scales = {_scale_of(name): (heads, 1) for name, (heads, _) in sizes.items()}
        cache = self.policy.create(batch_size, max_length, {**sizes, **scales}, dtype)
        return {
            name: ops.cast(x, "int8" if name in sizes else "float32")
            for name, x in cache.items()
        }

    def slots(self, max_length: int) -> int:
        """As many as the other policy needs."""
        return self.policy.slots(max_length)

    def write(
        self, cache: Any, new: dict[str, Any], index: Any, padding_mask: Any
    ) -> dict[str, Any]:
        """Quantizes new tokens, and writes them; see `FullCache.write`."""
        return self.policy.write(cache, self._encode(new), index, padding_mask)

    def _encode(self, new: dict[str, Any]) -> dict[str, Any]:
        encoded = {}
        for name, axis in self.axes.items():
            encoded[name], encoded[_scale_of(name)] = quantize(new[name], 5 - axis)
        return encoded

    def read(self, cache: Any, dtype: Any) -> dict[str, Any]:
        """Returns the numbers times their scales."""
        return {
            name: dequantize(cache[name], cache[_scale_of(name)], dtype)
            for name in self.axes
        }

    def as_stored(self, new: Any) -> Any:
        """Rounds as storing does."""
        return dequantize(*quantize(new, -1), new.dtype)

    def positions(self, cache: Any, index: Any) -> Any:
        """Those of the other policy."""
        return self.policy.positions(cache, index)

    def write_and_read(
        self, cache: Any, new: dict, index: Any, positions: Any, mask: Any
    ) -> tuple[Any, Any, Any]:
        """Writes, and returns what new tokens may attend to, as it is stored."""
        written, seen, positions = self.policy.write_and_read(
            cache, self._encode(new), index, positions, mask
        )
        dtype = next(iter(new.values())).dtype
        return written, self.read(seen, dtype), positions

    def place_scores(
        self, cache: Any, past: Any, new: Any, index: Any, padding_mask: Any
    ) -> Any:
        """As the other policy does."""
        return self.policy.place_scores(cache, past, new, index, padding_mask)

    def can_rewind(self, cache: Any, from_index: int, to_index: int) -> bool:
        """Whether the other policy can."""
        return self.policy.can_rewind(cache, from_index, to_index)


def with_scales(axes: dict[str, int]) -> dict[str, int]:
    """The axes of tensors, and of the scales that are stored beside them."""
    return {**axes, **{_scale_of(name): axis for name, axis in axes.items()}}


def _scale_of(name: str) -> str:
    return f"{name}_scale"


def quantize(x: Any, axis: int) -> tuple[Any, Any]:
    """Rounds to 8 bits, with one scale along an axis.

    Args:
        x: a floating point tensor.
        axis: int. The axis whose numbers share a scale.

    Returns:
        An `int8` tensor of the same shape and `float32` scales, of size 1 there.

    Example:

    >>> import numpy as np
    >>> from attention.caches.quantized_cache import dequantize, quantize
    >>> numbers, scale = quantize(np.array([[0.5, -1.0, 0.0]], "float32"), axis=-1)
    >>> np.array(numbers).tolist()
    [[64, -127, 0]]
    >>> np.array(dequantize(numbers, scale, "float32")).round(2).tolist()
    [[0.5, -1.0, 0.0]]
    """
    x = ops.cast(x, "float32")
    scale = ops.max(ops.abs(x), axis=axis, keepdims=True) / _LARGEST
    # Of zeros only: whatever they are divided by.
    divisor = ops.where(scale > 0, scale, 1.0)
    return ops.cast(ops.round(x / divisor), "int8"), scale


def dequantize(numbers: Any, scale: Any, dtype: str) -> Any:
    """The numbers that `quantize` has rounded."""
    return ops.cast(ops.cast(numbers, "float32") * scale, dtype)
