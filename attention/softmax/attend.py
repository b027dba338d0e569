"""Attending to keys and values of the past and of new tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from attention.caches.cache_policy import to_cache_layout
from attention.contract.types import Mask, Tensor
from attention.softmax.filled_slots import attend_to_filled
from attention.softmax.kernels import (
    fused_attention,
    fused_attention_applies,
    grouped_attention,
)
from attention.softmax.memory_efficient import memory_efficient_attention
from attention.softmax.visibility import Visibility

Pair = tuple[Tensor, Tensor]


class Weighting(NamedTuple):
    """How queries weigh the keys that they see.

    Attributes:
        compute_weights: called with logits, `(batch, num_heads, length,
            key_length)`, and a mask; returns weights of the same shape.
        scale: float. The factor of the products of queries and keys.
        bias: called with positions of queries and keys; returns a bias or `None`.
        soft_cap: `None` or float, as `logit_soft_cap` of a layer.
        dropout: `None`, or a callable applied to the weights.
        plain: bool. Whether it is the softmax of the scaled products and the bias.
    """

    compute_weights: Callable[[Any, Any], Any]
    scale: float
    bias: Callable[[Any, Any], Any]
    soft_cap: float | None
    dropout: Callable[[Any], Any] | None
    plain: bool


def attend_to(
    query: Tensor,
    new: Pair | None,
    past: Pair | None,
    visibility: Visibility,
    weighting: Weighting,
    return_scores: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attends to the visible keys, in the way that takes the least time.

    A sequence without a past is attended in blocks where the cache policy bounds how
    far queries see, by the backend's fused kernel, or a few queries at a time; a
    large cache only as far as it is filled.

    Args:
        query: tensor of shape `(batch, length, num_heads, key_dim)`.
        new: `None`, or keys and values of shape `(batch, key_length,
            num_key_value_heads, dim)`.
        past: `None`, or keys and values as in a cache: `(batch,
            num_key_value_heads, key_dim, slots)`, or `TokensFirst`, and `(batch,
            num_key_value_heads, slots, value_dim)`.
        visibility: which query sees which key, the past ones first.
        weighting: how queries weigh keys.
        return_scores: bool. Whether the weights are needed.

    Returns:
        The outputs, `(batch, length, num_heads, value_dim)`, and the weights, or
        `None` where they were not computed.
    """
    if past is None and new is not None and not return_scores:
        blocks = visibility.blocks(query, new[0])
        if blocks is not None:
            # The time is linear in the length. Blocks are not cut again.
            outputs, _ = attend_to(
                blocks.queries(query),
                (blocks.keys(new[0]), blocks.keys(new[1])),
                None,
                visibility.in_blocks(blocks, query),
                weighting,
            )
            return blocks.join(outputs), None
    mask = visibility.mask()
    bias = weighting.bias(visibility.query_positions, visibility.key_positions)
    scores = None

    def attend(past: Tensor, mask: Mask, bias: Tensor) -> Pair:
        parts = [] if past is None else [past]
        if new is not None:
            laid_out = to_cache_layout({"key": new[0], "value": new[1]})
            parts.append((laid_out["key"], laid_out["value"]))
        return grouped_attention(
            query,
            parts,
            lambda logits: weighting.compute_weights(logits, mask),
            bias,
            weighting.scale,
            weighting.soft_cap,
            weighting.dropout,
        )

    outputs_only = not return_scores and weighting.dropout is None and new is not None
    if outputs_only and past is not None:
        outputs = attend_to_filled(
            lambda *args: attend(*args)[0], past, mask, bias, visibility.key_positions
        )
    elif outputs_only and new is not None and weighting.plain:
        scale, value_dim = weighting.scale, new[1].shape[3]
        if fused_attention_applies(query.shape[3], value_dim):
            outputs = fused_attention(query, *new, mask, bias, scale)
        elif bias is None:
            ordered = visibility.hides_later_keys
            outputs = memory_efficient_attention(query, *new, mask, scale, ordered)
        else:
            outputs, _ = attend(None, mask, bias)
    else:
        outputs, scores = attend(past, mask, bias)
    if visibility.may_be_empty:
        # A query that sees no key gets zeros. Softmax has given it the mean of all
        # values, also of later ones.
        some = ops.any(mask, axis=-1, keepdims=True)
        outputs = ops.where(ops.swapaxes(some, 1, 2), outputs, 0)
        scores = None if scores is None else ops.where(some, scores, 0)
    return outputs, scores
