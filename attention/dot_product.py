"""Masks and the dot product attention of grouped heads."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.validation import describe, static_size

# Finite: a row in which everything is masked must not become NaN.
_MASKED = -1e30


def check_attention_mask(attention_mask: Any, query: Any, keys: Any) -> None:
    """Says so when an attention mask does not fit the queries and keys.

    Args:
        attention_mask: what was received.
        query: the queries, `(batch, query_length, width)`.
        keys: likewise, or `None` where a cache holds the keys: the mask may
            then have any number of columns.

    Raises:
        TypeError: if it is of a floating dtype: such masks are added to logits
            elsewhere, where zero means that a key is seen.
        ValueError: if it is of another shape.
    """
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
    rank_fits = len(attention_mask.shape) == 3
    sizes = [static_size(attention_mask, axis) for axis in range(3)]
    if not rank_fits or any(
        None not in (size, *fitting) and size not in fitting
        for size, fitting in zip(sizes, wanted)
    ):
        raise ValueError(
            "`attention_mask` must be of shape (batch, query_length, key_length). "
            f"Received: attention_mask={describe(attention_mask)}, query="
            f"{describe(query)}, keys={describe(keys)}"
        )


def combine_masks(
    query_positions: Any,
    key_positions: Any,
    causal: bool,
    key_padding_mask: Any = None,
    attention_mask: Any = None,
    in_order: bool = False,
) -> Any:
    """Combines all that says which key a query may attend to.

    Args:
        query_positions: `int32` tensor, `(query_length,)` or `(batch,
            query_length)`.
        key_positions: likewise for the keys.
        causal: bool. Whether keys at later positions are hidden.
        key_padding_mask: `None` or boolean tensor `(batch, key_length)`.
        attention_mask: `None` or boolean tensor `(batch, query_length,
            positions)`: its last axis counts positions of the sequence.
            Positions beyond its end are hidden.
        in_order: bool. Whether the positions of keys are 0, 1, 2 and so on,
            unless there is a row of them for each sequence.

    Returns:
        `None` where every key may be attended, otherwise a boolean tensor that
        broadcasts to `(batch, heads, query_length, key_length)`.
    """
    masks = []
    if causal:
        visible = key_positions[..., None, :] <= query_positions[..., :, None]
        masks.append(visible[None] if len(visible.shape) == 2 else visible)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, :])
    if attention_mask is not None:
        masks.append(_align(attention_mask, key_positions, in_order))
    if not masks:
        return None
    combined = masks[0]
    for mask in masks[1:]:
        combined = ops.logical_and(combined, mask)
    return combined[:, None]


def _align(attention_mask: Any, key_positions: Any, in_order: bool) -> Any:
    """Picks the columns of `attention_mask` that belong to the keys."""
    attention_mask = ops.cast(attention_mask, "bool")
    length = static_size(attention_mask, len(attention_mask.shape) - 1)
    if length is None or length == 1:
        return attention_mask
    if len(key_positions.shape) == 2:
        columns = ops.minimum(key_positions, length - 1)[:, None]
        known = (key_positions < length)[:, None]
        return ops.logical_and(
            ops.take_along_axis(attention_mask, columns, axis=-1), known
        )
    capacity = static_size(key_positions, 0)
    if in_order and (capacity is None or capacity == length):
        return attention_mask
    columns = ops.minimum(key_positions, length - 1)
    return ops.logical_and(
        ops.take(attention_mask, columns, axis=-1), key_positions < length
    )


def grouped_attention(
    query: Any,
    parts: list[tuple[Any, Any]],
    mask: Any = None,
    bias: Any = None,
    scale: float = 1.0,
    dropout: Any = None,
) -> tuple[Any, Any]:
    """Scaled dot product attention in which query heads share key/value heads.

    The heads that share a key/value head are computed as one matrix; keys and
    values are never repeated. They may come in parts, of a cache and of new
    tokens, which are not copied together. Softmax is computed in float32.

    Args:
        query: tensor of shape `(batch, query_length, num_heads, key_dim)`.
        parts: keys and values, one pair or several whose lengths add up to
            `key_length`: tensors of shape `(batch, num_key_value_heads, key_dim,
            length)` and `(batch, num_key_value_heads, length, value_dim)`.
        mask: `None` or boolean tensor that broadcasts to `(batch, num_heads,
            query_length, key_length)`, with a heads axis of 1.
        bias: `None` or float tensor `([batch,] num_heads, query_length,
            key_length)`.
        scale: float. What the logits are multiplied with.
        dropout: `None` or a callable applied to the weights.

    Returns:
        The outputs, `(batch, query_length, num_heads, value_dim)`, and the
        attention weights, `(batch, num_heads, query_length, key_length)`.
    """
    length, heads, dim = ops.shape(query)[1], query.shape[2], query.shape[3]
    groups = parts[0][0].shape[1]
    per_group = heads // groups
    query = ops.reshape(query, (-1, length, groups, per_group, dim))
    query = ops.transpose(query, (0, 2, 3, 1, 4))
    # What shares keys is one matrix.
    query = ops.reshape(query, (-1, groups, per_group * length, dim))
    logits = _concatenate([ops.matmul(query, key) for key, _ in parts])
    key_length = ops.shape(logits)[-1]
    logits = ops.reshape(logits, (-1, groups, per_group, length, key_length))
    logits = ops.cast(logits, "float32") * scale
    if bias is not None:
        lead = (-1,) if len(bias.shape) == 4 else ()
        bias_heads = bias.shape[-3]
        split = (1, 1) if bias_heads == 1 else (groups, per_group)
        logits = logits + ops.reshape(bias, (*lead, *split, *ops.shape(bias)[-2:]))
    if mask is not None:
        logits = ops.where(mask[:, :, None], logits, _MASKED)
    # Keras warns of a softmax over a single key, which is all right here.
    one_key = static_size(logits, 4) == 1
    weights = ops.ones_like(logits) if one_key else ops.softmax(logits, axis=-1)
    dropped = weights if dropout is None else dropout(weights)
    dropped = ops.cast(dropped, parts[0][1].dtype)
    dropped = ops.reshape(dropped, (-1, groups, per_group * length, key_length))
    outputs: Any = 0
    start: Any = 0
    for _, value in parts:
        end = start + ops.shape(value)[2]
        # One part is all of them.
        own = dropped if len(parts) == 1 else dropped[..., start:end]
        outputs, start = outputs + ops.matmul(own, value), end
    value_dim = parts[0][1].shape[3]
    outputs = ops.reshape(outputs, (-1, groups, per_group, length, value_dim))
    outputs = ops.transpose(outputs, (0, 3, 1, 2, 4))
    outputs = ops.reshape(outputs, (-1, length, heads, value_dim))
    return outputs, ops.reshape(weights, (-1, heads, length, key_length))


def _concatenate(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1)


def scale_query(query: Any, scale: float) -> tuple[Any, float]:
    """Scales the queries where the products could overflow without it.

    Returns:
        The queries, and what remains to multiply the logits with.
    """
    if keras.backend.standardize_dtype(query.dtype) != "float16":
        return query, scale
    return query * scale, 1.0


def fused_attention_applies(
    num_heads: int, num_key_value_heads: int, key_dim: int, value_dim: int, dtype: str
) -> bool:
    """Whether `keras.ops.dot_product_attention` computes these heads as they are.

    Outside of JAX it repeats keys and values for grouped heads. On JAX it takes
    no values of another size than the keys, and CPUs can't compile its float16.
    """
    if keras.config.backend() == "jax":
        import jax

        supported = dtype != "float16" or jax.default_backend() != "cpu"
        return key_dim == value_dim and supported
    return num_heads == num_key_value_heads


def fused_attention(
    query: Any, key: Any, value: Any, mask: Any, bias: Any, scale: float
) -> Any:
    """Attention by the backend's fused kernel, where it has one.

    Args:
        query: tensor of shape `(batch, query_length, num_heads, key_dim)`.
        key: tensor of shape `(batch, key_length, num_key_value_heads, key_dim)`.
        value: tensor of shape `(batch, key_length, num_key_value_heads,
            value_dim)`.
        mask: as for `grouped_attention`.
        bias: as for `grouped_attention`.
        scale: float. What the logits are multiplied with.

    Returns:
        Outputs of shape `(batch, query_length, num_heads, value_dim)`.
    """
    if bias is not None:
        # Not every backend takes a mask beside a bias.
        bias = bias if len(bias.shape) == 4 else bias[None]
        if mask is not None:
            bias = ops.where(mask, bias, _MASKED)
            mask = None
        bias = ops.cast(ops.maximum(bias, _lowest(query.dtype)), query.dtype)
        batch, length, heads = ops.shape(query)[:3]
        bias = ops.broadcast_to(bias, (batch, heads, length, ops.shape(key)[1]))
    return ops.dot_product_attention(
        query, key, value, bias=bias, mask=mask, scale=scale
    )


def _lowest(dtype: Any) -> float:
    """The lowest bias that stays finite in `dtype` when logits are added."""
    dtype = keras.backend.standardize_dtype(dtype)
    return float(np.finfo("float16").min) / 2 if dtype == "float16" else _MASKED
