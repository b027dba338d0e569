"""Cache policies: where keys and values of past positions are kept."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.cache_writes import write_tokens
from attention.validation import check_positive_int, static_size

# Later than all queries, and far enough from the largest int32 to be added to.
HIDDEN_POSITION = 2**30


def pack_key_value(
    key: Any, value: Any, positions: Any, padding_mask: Any = None
) -> dict[str, Any]:
    """Keys and values as layers hand them to `SharedKeyValueAttention`.

    Args:
        key: tensor of shape `(batch, heads, length, key_dim)`.
        value: tensor of shape `(batch, heads, length, value_dim)`.
        positions: `int32` tensor of shape `(length,)` or `(batch, length)`.
        padding_mask: `None` or boolean tensor of shape `(batch, length)`.

    Returns:
        A dict of `"key"`, `"value"` and `"positions"`, `(batch, length)`:
        `HIDDEN_POSITION` for padding, so that the causal mask hides it.

    Example:

    >>> import numpy as np
    >>> from attention.key_value_cache import pack_key_value
    >>> key = np.zeros((2, 1, 3, 4))
    >>> np.array(pack_key_value(key, key, np.arange(3))["positions"]).tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    if len(positions.shape) == 1:
        positions = positions[None]
    positions = ops.broadcast_to(positions, (ops.shape(key)[0], ops.shape(key)[2]))
    if padding_mask is not None:
        positions = ops.where(padding_mask, positions, HIDDEN_POSITION)
    return {"key": key, "value": value, "positions": positions}


class FullCache:
    """Keeps the key and the value of every position, in the slot of its number.

    The tensors are laid out `(batch, heads, length, dim)`, so that a decode
    step reads each head's keys as one contiguous block.
    """

    def create(
        self,
        batch_size: int,
        max_length: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: str,
    ) -> dict[str, Any]:
        """Returns a dict of two zero tensors, `"key"` and `"value"`."""
        batch_size = check_positive_int("batch_size", batch_size)
        max_length = check_positive_int("max_length", max_length)
        shape = (batch_size, num_heads, max_length)
        return {
            "key": ops.zeros((*shape, key_dim), dtype=dtype),
            "value": ops.zeros((*shape, value_dim), dtype=dtype),
        }

    def write(
        self, cache: Any, key: Any, value: Any, index: Any, padding_mask: Any
    ) -> dict[str, Any]:
        """Writes new keys and values behind the `index` absorbed positions.

        Args:
            cache: as created.
            key: tensor of shape `(batch, heads, new, key_dim)`.
            value: tensor of shape `(batch, heads, new, value_dim)`.
            index: int, or integer tensor of shape `()` or `(batch,)`.
            padding_mask: `None` or boolean tensor of shape `(batch, new)`.
                Padded tokens are not written over a live slot.

        Returns:
            The updated cache.

        Raises:
            ValueError: if the new positions can't fit, where that is known
                without looking into a tensor.
        """
        capacity, new = cache["key"].shape[2], static_size(key, 2)
        if new is not None and new > capacity:
            raise ValueError(
                f"{new} tokens were given to a cache of {capacity} positions. "
                "Create it with a larger `max_length`, or grow it with "
                "`grow_cache`."
            )
        known = isinstance(index, int) and new is not None
        if known and padding_mask is None and index + new > capacity:
            raise ValueError(
                f"{new} tokens at cache_update_index={index} do not fit "
                f"into a cache of {capacity} positions. Create it with a "
                "larger `max_length`, or grow it with `grow_cache`."
            )
        return {
            "key": write_tokens(cache["key"], key, index, padding_mask),
            "value": write_tokens(cache["value"], value, index, padding_mask),
        }

    def read(self, cache: Any) -> tuple[Any, Any, Any]:
        """Returns keys, values and the positions of their slots.

        Slots that were not written yet hold zeros, at positions that no query
        has reached: the causal mask hides them.
        """
        key, value = cache["key"], cache["value"]
        return key, value, ops.arange(key.shape[2], dtype="int32")

    def can_rewind(self, cache: Any, from_index: int, to_index: int) -> bool:
        """Slots behind the index are hidden, and overwritten before they are seen."""
        return True
