"""The choice of a cache policy: where tokens are kept, and in which dtype."""

from __future__ import annotations

from attention.caches.full_cache import KEY_VALUE_AXES, FullCache
from attention.caches.quantized_cache import QuantizedCache, with_scales
from attention.caches.ring_cache import RingCache
from attention.contract.arguments import describe


def make_cache_policy(
    window: int | None,
    cache_dtype: str | None,
    axes: dict[str, int] = KEY_VALUE_AXES,
) -> FullCache:
    """Makes the cache policy of an attention layer.

    Args:
        window: `None` or int. How many positions a query sees.
        cache_dtype: `None` or `"int8"`.
        axes: as for `FullCache`.

    Raises:
        ValueError: if `cache_dtype` is another one.

    Example:

    >>> from attention.caches.choice import make_cache_policy
    >>> policy = make_cache_policy(4, "int8")
    >>> cache = policy.create(1, 100, {"key": (2, 8), "value": (2, 8)}, "float32")
    >>> sorted(cache), tuple(cache["value"].shape)
    (['key', 'key_scale', 'value', 'value_scale'], (1, 2, 4, 8))
    """
    if cache_dtype not in (None, "int8"):
        raise ValueError(
            "`cache_dtype` must be None, which means the compute dtype, or 'int8'. "
            f"Received: cache_dtype={describe(cache_dtype)}"
        )
    stored = axes if cache_dtype is None else with_scales(axes)
    policy = FullCache(stored) if window is None else RingCache(window, stored)
    return policy if cache_dtype is None else QuantizedCache(axes, policy)
