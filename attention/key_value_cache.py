"""Cache policies: where keys and values of past positions are kept."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention import tensorflow_gradients
from attention.validation import check_positive_int, static_size

tensorflow_gradients.register()

# Later than all queries, and far enough from the largest int32 to be added to.
HIDDEN_POSITION = 2**30


def token_positions(cache_update_index: Any, length: Any) -> Any:
    """The positions of `length` tokens that follow the cached ones.

    Args:
        cache_update_index: `None` (no cache: start at 0), an int, an integer
            scalar tensor or an integer tensor of shape `(batch_size,)`.
        length: int or integer scalar tensor.

    Returns:
        An `int32` tensor of shape `(length,)`, or `(batch_size, length)` where
        rows stand at different positions.

    Example:

    >>> import numpy as np
    >>> from attention.key_value_cache import token_positions
    >>> np.array(token_positions(np.array([0, 5]), 3)).tolist()
    [[0, 1, 2], [5, 6, 7]]
    """
    steps = ops.arange(length, dtype="int32")
    if cache_update_index is None or isinstance(cache_update_index, int):
        return steps + (cache_update_index or 0)
    index = ops.cast(cache_update_index, "int32")
    if len(index.shape) == 0:
        return steps + index
    return steps[None, :] + index[:, None]


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
        if isinstance(index, int) and new is not None:
            if index + new <= capacity:
                # Slots behind `index` are not live: what a padded token leaves
                # there is overwritten before a token can attend to it.
                return {
                    "key": ops.slice_update(cache["key"], (0, 0, index, 0), key),
                    "value": ops.slice_update(cache["value"], (0, 0, index, 0), value),
                }
            if padding_mask is None:
                raise ValueError(
                    f"{new} tokens at cache_update_index={index} do not fit "
                    f"into a cache of {capacity} positions. Create it with a "
                    "larger `max_length`, or grow it with `grow_cache`."
                )
        positions = token_positions(index, ops.shape(key)[2])
        live = positions < capacity
        if len(positions.shape) == 1:
            live = live[None, :]
        if padding_mask is not None:
            live = ops.logical_and(live, padding_mask)
        live = live[:, None, :, None]
        update = _write_slot if new == 1 and len(positions.shape) == 1 else _write_rows
        return {
            "key": update(cache["key"], key, positions, live),
            "value": update(cache["value"], value, positions, live),
        }

    def read(self, cache: Any) -> tuple[Any, Any, Any]:
        """Returns keys, values and the positions of their slots.

        Slots that were not written yet hold zeros, at positions that no query
        has reached: the causal mask hides them.
        """
        key, value = cache["key"], cache["value"]
        return key, value, ops.arange(key.shape[2], dtype="int32")


def _write_slot(cache: Any, update: Any, positions: Any, live: Any) -> Any:
    """Writes one token per row, all rows at the same position."""
    start = ops.minimum(positions[0], cache.shape[2] - 1)
    shape = (ops.shape(cache)[0], cache.shape[1], 1, cache.shape[3])
    current = ops.slice(cache, (0, 0, start, 0), shape)
    update = ops.where(live, update, current)
    return ops.slice_update(cache, (0, 0, start, 0), update)


def _write_rows(cache: Any, update: Any, positions: Any, live: Any) -> Any:
    """Writes tokens whose rows stand at different positions.

    Tokens that are not to be written write back what their slot holds. Each
    has a slot of its own, as it wraps around past the end: two writes to one
    slot would come in an order nobody knows.
    """
    batch, heads, capacity, dim = ops.shape(cache)
    slots = ops.broadcast_to(
        positions if len(positions.shape) == 2 else positions[None, :],
        (batch, ops.shape(update)[2]),
    )
    slots = ops.mod(slots, capacity)[:, None, :]
    rows = ops.arange(batch, dtype="int32")[:, None, None]
    head = ops.arange(heads, dtype="int32")[None, :, None]
    indices = ops.stack(
        [
            ops.reshape(ops.broadcast_to(x, ops.shape(update)[:3]), (-1,))
            for x in (rows, head, slots)
        ],
        axis=-1,
    )
    current = ops.take_along_axis(
        cache, ops.broadcast_to(slots[..., None], ops.shape(update)), axis=2
    )
    update = ops.reshape(ops.where(live, update, current), (-1, dim))
    return ops.scatter_update(cache, indices, update)
