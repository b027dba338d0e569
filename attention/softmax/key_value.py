"""Keys and values: their layouts, and how layers hand them on."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.positions.arithmetic import hide_padding, one_row_each


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
    >>> from attention.softmax.key_value import pack_key_value
    >>> key = np.zeros((2, 1, 3, 4))
    >>> np.array(pack_key_value(key, key, np.arange(3))["positions"]).tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    positions = hide_padding(one_row_each(positions, key), padding_mask)
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
