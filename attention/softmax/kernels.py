"""The dot product attention of grouped heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract.sizes import static_size, torch_device
from attention.contract.types import Mask, Tensor

# Finite: a row in which everything is masked must not become NaN.
_MASKED = -1e30
_HALF_PRECISION = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TokensFirst:
    """Keys that are laid out as values are: `(batch, heads, length, key_dim)`."""

    keys: Tensor


def _products(query: Tensor, key: Tensor) -> Tensor:
    """Returns `float32` products of `(batch, heads, queries, key_dim)` and keys."""
    if not isinstance(key, TokensFirst):
        return matmul_to_float32(query, key)
    # (batch, heads, keys, queries). On the right the keys would be transposed.
    products = matmul_to_float32(key.keys, ops.swapaxes(query, 2, 3))
    return ops.swapaxes(products, 2, 3)


def matmul_to_float32(a: Tensor, b: Tensor) -> Tensor:
    """Returns a matrix product that is never rounded to half precision.

    Products of published models' queries and keys exceed float16's largest number, and
    bfloat16 has no number between 128 and 129.
    """
    if keras.backend.standardize_dtype(a.dtype) not in _HALF_PRECISION:
        return ops.cast(ops.matmul(a, b), "float32")
    if keras.config.backend() == "jax":
        import jax.numpy as jnp

        # GPUs and TPUs multiply halves into float32. CPUs would cast them anyway.
        return jnp.matmul(a, b, preferred_element_type="float32")
    return ops.matmul(ops.cast(a, "float32"), ops.cast(b, "float32"))


def grouped_attention(
    query: Tensor,
    parts: list[tuple[Tensor, Tensor]],
    compute_weights: Callable[[Any], Any],
    bias: Tensor = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    dropout: Any = None,
) -> tuple[Tensor, Tensor]:
    """Computes dot product attention in which query heads share key/value heads.

    The heads that share a key/value head are computed as one matrix; keys and values
    are never repeated. They may come in parts, which are not copied together.

    Args:
        query: tensor of shape `(batch, query_length, num_heads, key_dim)`.
        parts: pairs of keys and values whose lengths add up to `key_length`: `(batch,
            groups, key_dim, length)`, or `TokensFirst`, and `(batch, groups, length,
            value_dim)`.
        compute_weights: called with `float32` logits of shape `(batch, num_heads,
            query_length, key_length)`; returns weights of the same shape.
        bias: `None` or float tensor `([batch,] 1 or num_heads, queries, keys)`.
        soft_cap: `None` or float. Scaled products are kept between it and its
            negative.
        dropout: `None` or a callable applied to the weights.

    Returns:
        The outputs, `(batch, length, num_heads, dim)`, and the weights without dropout.
    """
    length, heads, dim = ops.shape(query)[1], query.shape[2], query.shape[3]
    groups = parts[0][1].shape[1]
    per_group = heads // groups
    query = ops.reshape(query, (-1, length, groups, per_group, dim))
    query = ops.transpose(query, (0, 2, 3, 1, 4))
    # (batch, groups, per_group * length, dim): heads that share keys are one matrix.
    query = ops.reshape(query, (-1, groups, per_group * length, dim))
    logits = [_products(query, key) for key, _ in parts]
    logits = logits[0] if len(parts) == 1 else ops.concatenate(logits, axis=-1)
    key_length = ops.shape(logits)[-1]
    # (batch, num_heads, length, key_length)
    logits = ops.reshape(logits, (-1, heads, length, key_length))
    logits = logits * scale
    if soft_cap is not None:
        logits = soft_cap * ops.tanh(logits / soft_cap)
    weights = compute_weights(logits if bias is None else logits + bias)
    dropped = weights if dropout is None else dropout(weights)
    dropped = ops.cast(dropped, parts[0][1].dtype)
    dropped = ops.reshape(dropped, (-1, groups, per_group * length, key_length))
    outputs: Tensor = 0
    start: Tensor = 0
    for _, value in parts:
        end = start + ops.shape(value)[2]
        # One part is all of them.
        own = dropped if len(parts) == 1 else dropped[..., start:end]
        outputs, start = outputs + ops.matmul(own, value), end
    value_dim = parts[0][1].shape[3]
    outputs = ops.reshape(outputs, (-1, groups, per_group, length, value_dim))
    outputs = ops.transpose(outputs, (0, 3, 1, 2, 4))
    # (batch, length, num_heads, value_dim)
    return ops.reshape(outputs, (-1, length, heads, value_dim)), weights


def masked_softmax(logits: Tensor, mask: Mask, sinks: Tensor = None) -> Tensor:
    """Returns the weights of `float32` logits, `(batch, heads, queries, keys)`.

    `mask` is `None` or marks the visible keys; `sinks`, `(heads,)`, are the logits of a
    key that every query sees and whose value is zero.
    """
    if mask is not None:
        logits = ops.where(mask, logits, _MASKED)
    if sinks is not None:
        sinks = ops.reshape(ops.cast(sinks, "float32"), (1, -1, 1, 1))
        sinks = ops.broadcast_to(sinks, (*ops.shape(logits)[:-1], 1))
        logits = ops.concatenate([logits, sinks], axis=-1)
    # Keras warns of a softmax over a single key, which is fine here.
    one_key = static_size(logits, 3) == 1
    weights = ops.ones_like(logits) if one_key else ops.softmax(logits, axis=-1)
    return weights if sinks is None else weights[..., :-1]


def fused_attention_applies(key_dim: int, value_dim: int) -> bool:
    """Returns whether `keras.ops.dot_product_attention` has a fused kernel.

    TensorFlow has none, and JAX has none on CPUs: all weights would be kept for the
    gradient. On JAX it takes no values of another size than the keys. On torch keys and
    values are repeated for grouped heads, which takes less time than doing without it.
    """
    if keras.config.backend() == "jax":
        import jax

        return key_dim == value_dim and jax.default_backend() != "cpu"
    return keras.config.backend() == "torch"


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, bias: Tensor, scale: float
) -> Tensor:
    """Computes attention by the backend's fused kernel, where it has one.

    Queries, keys and values are `(batch, length, heads, dim)`; the rest is as for
    `grouped_attention`, and so are the outputs.
    """
    dtype = query.dtype
    half = keras.backend.standardize_dtype(dtype) == "float16"
    if half and torch_device(query) == "cpu":
        # A mask is added to the logits, on torch. Those that float16's lowest number
        # does not hide would show, and CPUs are as fast in float32.
        query, key, value = (ops.cast(x, "float32") for x in (query, key, value))
        half = False
    if bias is not None:
        # Not every backend takes a mask beside a bias.
        bias = bias if len(bias.shape) == 4 else bias[None]
        if mask is not None:
            bias = ops.where(mask, bias, _MASKED)
            mask = None
        # Lower ones would not stay finite when logits are added.
        lowest = float(np.finfo("float16").min) / 2 if half else _MASKED
        bias = ops.cast(ops.maximum(bias, lowest), query.dtype)
        batch, length, heads = ops.shape(query)[:3]
        bias = ops.broadcast_to(bias, (batch, heads, length, ops.shape(key)[1]))
    outputs = ops.dot_product_attention(
        query, key, value, bias=bias, mask=mask, scale=scale
    )
    return ops.cast(outputs, dtype)
