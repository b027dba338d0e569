"""Checks of the arguments of attention's calls, and of what layers hand on."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from attention.contract.arguments import describe, dtype_name
from attention.contract.checks import mask_fits
from attention.contract.segments import check_segments
from attention.contract.sizes import is_concrete, is_tensor, static_size
from attention.contract.types import Index, Mask, Tensor
from attention.positions.arithmetic import hide_padding, one_row_each


def check_attention_mask(attention_mask: Mask, query: Tensor, keys: Tensor) -> None:
    """Raises an error if an attention mask does not fit the queries and keys.

    `keys` is `None` where a cache holds them: the mask may then have any number of
    columns. Masks of a floating dtype are refused with a `TypeError`: they are added to
    logits elsewhere, where zero means that a key is seen.
    """
    if attention_mask is None:
        return
    dtype = str(getattr(attention_mask, "dtype", "unknown"))
    if "bool" not in dtype and "int" not in dtype:
        raise TypeError(
            "`attention_mask` must be boolean: true where a query may attend to a "
            f"key. Received: attention_mask={describe(attention_mask)}. Turn a mask "
            "that is added to logits into one with `mask == 0`."
        )
    wanted = [(1, static_size(query, 0)), (1, static_size(query, 1))]
    if keys is not None:
        wanted.append((1, static_size(keys, 1)))
    sizes = [static_size(attention_mask, axis) for axis in range(3)]
    if len(attention_mask.shape) != 3 or any(
        None not in (size, *fitting) and size not in fitting
        for size, fitting in zip(sizes, wanted)
    ):
        raise ValueError(
            "`attention_mask` must be of shape (batch, query_length, key_length). "
            f"Received: attention_mask={describe(attention_mask)}, query="
            f"{describe(query)}, keys={describe(keys)}"
        )


def check_prefix_length(layer_name: str, prefix_length: Index, inputs: Any) -> Any:
    """Returns the length of a prefix as an `int32` tensor, `()` or `(batch,)`.

    Raises a `TypeError` if it holds no integers, and a `ValueError` if it is negative
    or of another shape.
    """
    if prefix_length is None:
        return None
    if isinstance(prefix_length, (list, tuple, int)):
        prefix_length = np.asarray(prefix_length)
    wanted = (
        "an int, or an integer tensor of shape () or (batch,). Received by layer "
        f"'{layer_name}': prefix_length={describe(prefix_length)}, inputs="
        f"{describe(inputs)}"
    )
    if not hasattr(prefix_length, "shape") or "int" not in str(prefix_length.dtype):
        raise TypeError(f"`prefix_length` must be {wanted}")
    rows, given = static_size(inputs, 0), tuple(prefix_length.shape)
    if len(given) > 1 or (given and None not in (rows, given[0]) and given[0] != rows):
        raise ValueError(f"`prefix_length` must be {wanted}")
    if isinstance(prefix_length, np.ndarray) and (prefix_length < 0).any():
        raise ValueError(
            f"`prefix_length` of layer '{layer_name}' must not be negative. Received: "
            f"prefix_length={int(prefix_length.min())}"
        )
    return ops.convert_to_tensor(prefix_length, dtype="int32")


def check_segment_ids(layer_name: str, segment_ids: Tensor, inputs: Any) -> Any:
    """Returns segment ids as a tensor, `(batch, length)`.

    Raises a `TypeError` if they are no integers, and a `ValueError` if they are of
    another shape than the inputs.
    """
    if segment_ids is None:
        return None
    by_layer = f" by layer '{layer_name}'"
    segment_ids = check_segments(segment_ids, by_layer)
    if not mask_fits(segment_ids, inputs):
        raise ValueError(
            "`segment_ids` must be of shape (batch, length), a number for each token. "
            f"Received{by_layer}: segment_ids={describe(segment_ids)}, "
            f"inputs={describe(inputs)}"
        )
    return ops.convert_to_tensor(segment_ids)


def only_whole_prefixes(
    layer_name: str, outputs: Tensor, prefix_length: Index, cache_update_index: Index
) -> Any:
    """Returns the outputs, and refuses calls that begin within a prefix.

    The tokens before them would have had to see the new tokens. Where the index is not
    known, in a compiled graph, the outputs of such rows are NaN.
    """
    index = ops.convert_to_tensor(cache_update_index, dtype="int32")
    within = ops.logical_and(index > 0, index < prefix_length)
    if is_concrete(within):
        if bool(ops.any(within)):
            raise ValueError(
                f"A call of layer '{layer_name}' with a cache begins within the "
                "prefix: tokens before `prefix_length` see each other in both "
                "directions, so they belong in one call, at cache_update_index=0. "
                f"Received: cache_update_index={describe(cache_update_index)}"
            )
        return outputs
    # A graph can raise no error; NaN is better than wrong outputs.
    within = ops.reshape(within, (-1, 1, 1))
    return ops.where(within, float("nan"), outputs)


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
