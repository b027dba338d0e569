"""Keys and values: their layouts, and how layers hand them on."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.contract.arguments import describe, dtype_name
from attention.contract.sizes import is_tensor, static_size
from attention.contract.types import Mask, Tensor
from attention.positions.arithmetic import hide_padding, one_row_each


def pack_key_value(
    seen: dict[str, Any], positions: Tensor, padding_mask: Mask = None
) -> dict[str, Any]:
    """Returns keys and values as layers hand them to `SharedKeyValueAttention`.

    `seen` is laid out as a cache; the result is a dict of `"key"` and `"value"`, both
    `(batch, heads, length, dim)`, and `"positions"`, `(batch, length)`:
    `HIDDEN_POSITION` for padding, so that the causal mask hides it.
    """
    key, value = ops.swapaxes(seen["key"], 2, 3), seen["value"]
    positions = hide_padding(one_row_each(positions, key), padding_mask)
    return {"key": key, "value": value, "positions": positions}


def check_key_value(layer_name: str, key_value: Tensor, query: Tensor) -> None:
    """Raises an error if `key_value` is not what an attention layer returns.

    It is a `TypeError` if it is no dict of tensors, or positions are no integers, and a
    `ValueError` if it has other entries, ranks, lengths or rows.
    """
    hint = (
        "It is what `GroupedQueryAttention` returns, after its outputs, when "
        "called with `return_key_value=True`: a dict of 'key' and 'value', of shape "
        "(batch, heads, key_length, dim), and 'positions', integers of shape "
        f"(batch, key_length). Received: key_value={describe(key_value)}, query="
        f"{describe(query)}"
    )
    if not isinstance(key_value, dict):
        raise TypeError(f"Layer '{layer_name}' needs `key_value`. {hint}")
    ranks = {"key": 4, "value": 4, "positions": 2}
    if set(key_value) != set(ranks):
        raise ValueError(f"Layer '{layer_name}' can't attend to `key_value`. {hint}")
    if not all(map(is_tensor, key_value.values())):
        raise TypeError(f"Layer '{layer_name}' needs tensors in `key_value`. {hint}")
    if "int" not in dtype_name(key_value["positions"]):
        raise TypeError(
            f"Layer '{layer_name}' needs integers as positions in `key_value`. {hint}"
        )
    key, value, positions = (key_value[name] for name in ranks)
    sames = (
        ((key, 0), (value, 0), (positions, 0), (query, 0)),
        ((key, 1), (value, 1)),
        ((key, 2), (value, 2), (positions, 1)),
    )
    if any(len(key_value[name].shape) != rank for name, rank in ranks.items()) or any(
        len({static_size(x, axis) for x, axis in same} - {None}) > 1 for same in sames
    ):
        raise ValueError(
            f"Layer '{layer_name}' can't attend to `key_value`: its shapes do not fit "
            f"together, or not to the rows of `query`. {hint}"
        )
