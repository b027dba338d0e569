"""Cached dot product attention, from multi-head to multi-query."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract.arguments import check_positive_int
from attention.contract.types import Tensor
from attention.positions.position_scheme import PositionScheme
from attention.softmax.dot_product_attention import DotProductAttention


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class GroupedQueryAttention(DotProductAttention):
    """Attention in which groups of query heads share a key/value head.

    ```
    query ──► query_dense ──► encode ─────────────┐
    value ─┬► key_dense ────► encode ─► cache ─► softmax(q·k + bias) ─┐
           └► value_dense ────────────► cache ──────────────────────► × ► output_dense
    ```

    The same call trains (no cache), reads a prompt and decodes (with one), with
    rows at the same position or each at its own. Causality is computed from
    positions. A cache never repeats key/value heads to match the query heads.

    Args:
        num_heads: int. The number of query heads.
        num_key_value_heads: int. The number of key/value heads; divides
            `num_heads`. One is multi-query attention.
        key_dim: int or `None`. The size of each query and key head. `None`
            means the width of the inputs divided by `num_heads`.
        value_dim: int or `None`. The size of each value head; `None`: `key_dim`.
        dropout: float. The dropout rate of the attention weights.
        use_bias: bool. Whether the projections have biases.
        position: `None` or a position scheme, such as `RotaryPosition()`.
        causal: bool. Whether a token attends to no later one. If not, there is no
            cache, as each new token would change all earlier outputs.
        scale: float or `None`. The factor of the logits, `1 / sqrt(key_dim)`.
        window: int or `None`. How many positions a query sees, itself included:
            a sliding window, whose cache has at most as many slots.
            Without causality so many to either side. `None` means all positions.
        kernel_initializer: initializer of the projections.
        bias_initializer: initializer of their biases.
        query_key_norm: bool. Whether query and key heads are normalized by their root
            mean square, with a scale for each dimension, before positions are encoded.
        logit_soft_cap: float or `None`. Logits `x` become `cap * tanh(x / cap)`.
        attention_sinks: bool. Whether each head has a trainable logit that takes
            part in the softmax and has no value.
        output_gate: bool. Whether a sigmoid of a projection of the query's input
            multiplies the outputs of heads, before the output projection.
        cache_dtype: `None` or `"int8"`: keys and values are cached in 8 bits, with
            a scale for each head of each token. `None` means the compute dtype.
        cache_policy: `None`, which means that of `window` and `cache_dtype`, or a
            `CachePolicy`, which decides which tokens are kept, and so seen, and in
            which dtype: `FullCache()`, `RingCache(window, keep)`,
            `QuantizedCache(policy)` or your own.
        output_bias: bool or `None`. Whether the output projection has a bias; `None`:
            `use_bias`.
        norm_epsilon: float. The epsilon of `query_key_norm`.
        key_bias: bool or `None`. Whether the key projection has a bias; `None`:
            `use_bias`. (A bias of all keys changes no output.)
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        query: tensor of shape `(batch, length, width)`.
        value: tensor of shape `(batch, key_length, value_width)`; `None` means
            `query`: self-attention.
        key: tensor of shape `(batch, key_length, key_width)`; `None` means `value`.
        attention_mask: boolean tensor of shape `(batch, length, key_length)`:
            which keys each query may attend to, in addition to causality. With
            a cache its last axis counts the positions of the sequence from 0;
            those beyond its end are hidden.
        padding_mask: boolean tensor of shape `(batch, length)`: the real
            tokens of `query`, padded on the right.
        cache: a cache made by `create_cache`.
        cache_update_index: as for every `CachedLayer`.
        return_attention_scores: bool. Whether to return the weights, too.
        return_key_value: bool. Whether to return the keys and values, too, for
            layers that attend to them as well (`SharedKeyValueAttention`).
        training: bool. Whether to apply dropout.
        prefix_length: `None`, int, or integer tensor of shape `()` or `(batch,)`:
            tokens before this position see each other in both directions
            (PrefixLM). With a cache, the whole prefix must be in one call: another
            call that begins within it is an error, or gives NaN where compiled.
        segment_ids: `None` or integer tensor of shape `(batch, length)`: tokens
            see only those of their own document. Not with a cache.

    Returns:
        A tensor of shape `(batch, length, width)` in the compute dtype. With
        `return_attention_scores`, `(outputs, scores)`, where `scores` are
        `float32` of shape `(batch, num_heads, length, key_length)`; with a
        cache `key_length` is that of the cache, zero for empty slots, and with a
        window's cache that of its slots and the new tokens. With
        `return_key_value`, `(outputs, key_value)`, where `key_value` is a dict
        of all that these queries may attend to: `"key"` of shape `(batch,
        num_key_value_heads, key_length, key_dim)`, `"value"` of shape `(batch,
        num_key_value_heads, key_length, value_dim)`, and `"positions"`, `int32` of
        shape `(batch, key_length)`, larger than all others for padding; with a cache,
        keys and values are the cache's own tensors, except at index 0, where they are
        those of the new tokens. With both, `(outputs, scores, key_value)`. With a
        cache, a tuple of these and of the cache.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if numbers of heads do not divide, shapes do not fit
            together, or tokens do not fit into the cache.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from attention import GroupedQueryAttention
    >>> layer = GroupedQueryAttention(num_heads=4, num_key_value_heads=2)
    >>> x = np.random.normal(size=(2, 6, 16)).astype("float32")
    >>> outputs = layer(x)
    >>> cache = layer.create_cache(batch_size=2, max_length=8)
    >>> head, cache = layer(x[:, :5], cache=cache, cache_update_index=0)
    >>> tail, cache = layer(x[:, 5:], cache=cache, cache_update_index=5)
    >>> bool(ops.all(ops.isclose(tail, outputs[:, 5:], atol=1e-5)))
    True

    References:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    - [Ainslie et al., 2023](https://arxiv.org/abs/2305.13245)
    - [Beltagy et al., 2020](https://arxiv.org/abs/2004.05150) (`window`)
    - [Henry et al., 2020](https://arxiv.org/abs/2010.04245) (`query_key_norm`)
    - [Gemma 2, 2024](https://arxiv.org/abs/2408.00118) (`logit_soft_cap`)
    - [OpenAI, 2025](https://arxiv.org/abs/2508.10925) (`attention_sinks`)
    - [Qiu et al., 2025](https://arxiv.org/abs/2505.06708) (`output_gate`)
    - [Raffel et al., 2019](https://arxiv.org/abs/1910.10683) (`prefix_length`)
    """

    num_key_value_heads: int

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        position: PositionScheme | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads,
            num_key_value_heads,
            key_dim,
            value_dim,
            dropout,
            use_bias,
            position,
            **kwargs,
        )
        # Here it may not be None.
        check_positive_int("num_key_value_heads", num_key_value_heads)

    def build(
        self,
        query_shape: tuple,
        value_shape: tuple | None = None,
        key_shape: tuple | None = None,
    ) -> None:
        value_shape = value_shape or query_shape
        key_shape = key_shape or value_shape
        self._check_width(query_shape)
        make = self.make_projection
        value_heads = (self.num_key_value_heads, self.head_dims()[1])
        self.query_dense = make("query", self.query_heads(), query_shape)
        self.key_dense = make("key", self.key_heads(), key_shape)
        self.value_dense = make("value", value_heads, value_shape)
        self.query_norm = self.make_norm("query_norm")
        self.key_norm = self.make_norm("key_norm")
        self.build_output(query_shape)

    def key_heads(self) -> tuple[int, int]:
        """Returns how many key heads of which size are projected."""
        return self.num_key_value_heads, self.head_dims()[0]

    def cache_sizes(self) -> dict[str, tuple[int, int]]:
        key_dim, value_dim = self.head_dims()
        heads = self.num_key_value_heads
        return {"key": (heads, key_dim), "value": (heads, value_dim)}

    def project(
        self, query: Tensor, value: Tensor, key: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.project_query(query), self.project_key_value(value, key)

    def project_key_value(self, value: Tensor, key: Tensor) -> dict[str, Tensor]:
        """Returns heads of keys and values, `(batch, key_length, heads, dim)` each."""
        key = self.key_dense(key)
        key = key if self.key_norm is None else self.key_norm(key)
        return {"key": key, "value": self.value_dense(value)}
