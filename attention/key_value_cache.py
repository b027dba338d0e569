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


def to_cache_layout(key: Any, value: Any) -> tuple[Any, Any]:
    """Lays out keys and values as caches do.

    Args:
        key: tensor of shape `(batch, length, heads, key_dim)`.
        value: tensor of shape `(batch, length, heads, value_dim)`.

    Returns:
        Tensors of shape `(batch, heads, key_dim, length)` and `(batch, heads,
        length, value_dim)`.
    """
    return ops.transpose(key, (0, 2, 3, 1)), ops.swapaxes(value, 1, 2)


def join_positions(past: Any, new: Any) -> Any:
    """The positions of past and new keys, `(length,)` or `(batch, length)` each."""
    batch = next((ops.shape(x)[0] for x in (past, new) if len(x.shape) == 2), None)
    if batch is not None:
        past, new = (
            x if len(x.shape) == 2 else ops.broadcast_to(x, (batch, ops.shape(x)[0]))
            for x in (past, new)
        )
    return ops.concatenate([past, new], axis=-1)


def is_zero(index: Any) -> bool:
    """Whether a cache is known to have absorbed nothing."""
    return isinstance(index, int) and index == 0


class FullCache:
    """Keeps the key and the value of every position, in the slot of its number.

    Keys are laid out `(batch, heads, dim, length)` and values `(batch, heads,
    length, dim)`: a decode step multiplies a matrix that lies in memory as it
    is read, for which neither XLA nor a CPU's kernels have to transpose it.
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
        shape = (batch_size, num_heads)
        return {
            "key": ops.zeros((*shape, key_dim, max_length), dtype=dtype),
            "value": ops.zeros((*shape, max_length, value_dim), dtype=dtype),
        }

    def write(
        self, cache: Any, key: Any, value: Any, index: Any, padding_mask: Any
    ) -> dict[str, Any]:
        """Writes new keys and values behind the `index` absorbed positions.

        Args:
            cache: as created.
            key: tensor of shape `(batch, new, heads, key_dim)`.
            value: tensor of shape `(batch, new, heads, value_dim)`.
            index: int, or integer tensor of shape `()` or `(batch,)`.
            padding_mask: `None` or boolean tensor of shape `(batch, new)`.
                Padded tokens are not written over a live slot.

        Returns:
            The updated cache.

        Raises:
            ValueError: if the new positions can't fit, where that is known
                without looking into a tensor.
        """
        capacity, new = cache["value"].shape[2], static_size(key, 1)
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
        key, value = to_cache_layout(key, value)
        return {
            "key": write_tokens(cache["key"], key, index, padding_mask, axis=3),
            "value": write_tokens(cache["value"], value, index, padding_mask, axis=2),
        }

    def read(self, cache: Any, index: Any = None) -> tuple[Any, Any, Any]:
        """Returns keys, values and the positions of their slots.

        Args:
            cache: as created.
            index: `None`, int, or integer tensor of shape `()` or `(batch,)`:
                where given, slots behind these absorbed positions are at
                `HIDDEN_POSITION`.

        Returns:
            Keys of shape `(batch, heads, key_dim, length)`, values of shape
            `(batch, heads, length, value_dim)`, and `int32` positions of shape
            `(length,)` or `(batch, length)`. Slots that were not written yet
            hold zeros.
        """
        key, value = cache["key"], cache["value"]
        positions = ops.arange(value.shape[2], dtype="int32")
        if index is not None:
            index = ops.cast(index, "int32")[..., None]
            positions = ops.where(positions < index, positions, HIDDEN_POSITION)
        return key, value, positions

    def can_rewind(self, cache: Any, from_index: int, to_index: int) -> bool:
        """Slots behind the index are hidden, and overwritten before they are seen."""
        return True
