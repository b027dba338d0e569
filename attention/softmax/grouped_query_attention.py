"""Cached dot product attention, from multi-head to multi-query."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.caches.choice import make_cache_policy
from attention.caches.writes import computed_after
from attention.contract.arguments import check_positive_int, describe
from attention.contract.padding import zero_padding
from attention.contract.sizes import static_size
from attention.positions.arithmetic import (
    hide_padding,
    is_zero,
    join_positions,
    token_positions,
)
from attention.positions.position_scheme import PositionScheme
from attention.softmax.dot_product_attention import DotProductAttention
from attention.softmax.key_value import pack_key_value, to_cache_layout
from attention.softmax.prefix import (
    check_prefix_length,
    check_segment_ids,
    only_whole_prefixes,
)
from attention.softmax.visibility import Visibility, check_attention_mask


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
    positions. Query heads and key/value heads are never repeated to match.

    Args:
        num_heads: int. The number of query heads.
        num_key_value_heads: int. The number of key/value heads; divides
            `num_heads`. As many as `num_heads` is multi-head attention, one is
            multi-query attention.
        key_dim: int or `None`. The size of each query and key head. `None`
            means the width of the inputs divided by `num_heads`.
        value_dim: int or `None`. The size of each value head; `None` means
            `key_dim`.
        dropout: float. The dropout rate of the attention weights.
        use_bias: bool. Whether the projections have biases.
        position: `None` or a position scheme, such as `RotaryPosition()`.
        causal: bool. Whether a token attends to no later one. A layer that is
            not causal has no cache, as each new token would change all earlier
            outputs.
        scale: float or `None`. What the logits are multiplied with; `None`
            means `1 / sqrt(key_dim)`.
        window: int or `None`. How many positions a query sees, itself included:
            a sliding window, whose cache has as many slots and never grows.
            Without causality so many to either side. `None` means all positions.
        kernel_initializer: initializer of the projections.
        bias_initializer: initializer of their biases.
        query_key_norm: bool. Whether each query head and key head is normalized
            by its root mean square, with a scale for each of its dimensions,
            before positions are encoded.
        logit_soft_cap: float or `None`. Logits `x` become `cap * tanh(x / cap)`.
        attention_sinks: bool. Whether each head has a trainable logit that takes
            part in the softmax and stands for no value.
        output_gate: bool. Whether a sigmoid of a projection of the query's input
            multiplies what the heads found, before the output projection.
        cache_dtype: `None` or `"int8"`: keys and values are cached in 8 bits, with
            a scale for each head of each token. `None` means the compute dtype.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        query: tensor of shape `(batch, length, width)`.
        value: tensor of shape `(batch, key_length, value_width)`; `None` means
            `query`: self-attention.
        key: tensor of shape `(batch, key_length, key_width)`; `None` means
            `value`.
        attention_mask: boolean tensor of shape `(batch, length, key_length)`:
            which keys each query may attend to, in addition to causality. With
            a cache its last axis counts the positions of the sequence from 0;
            those beyond its end are hidden.
        padding_mask: boolean tensor of shape `(batch, length)`: the real
            tokens of `query`, padded on the right.
        cache: a cache made by `create_cache`.
        cache_update_index: how many positions the cache has absorbed: an int,
            an integer scalar tensor or an integer tensor of shape `(batch,)`.
        return_attention_scores: bool. Whether to return the weights, too.
        return_key_value: bool. Whether to return the keys and values, too, for
            layers that attend to them as well (`SharedKeyValueAttention`).
        training: bool. Whether to apply dropout.
        prefix_length: `None`, int, or integer tensor of shape `()` or `(batch,)`:
            tokens before this position see each other in both directions
            (PrefixLM). With a cache, the whole prefix belongs in one call:
            another one that begins within it is an error, or gives NaN where that
            is not known before a graph runs.
        segment_ids: `None` or integer tensor of shape `(batch, length)`: tokens
            see only those of their own document. Not with a cache.

    Returns:
        A tensor of shape `(batch, length, width)` in the compute dtype. With
        `return_attention_scores`, `(outputs, scores)`, where `scores` are
        `float32` of shape `(batch, num_heads, length, key_length)`; with a
        cache `key_length` is the cache's, zero for what is not filled, and with a
        window's cache that of its slots and the new tokens. With
        `return_key_value`, `(outputs, key_value)`, where `key_value` is a dict
        of all that these queries may attend to: `"key"`, `(batch,
        num_key_value_heads, key_length, key_dim)`, `"value"` likewise, and
        `"positions"`, `int32` of shape `(batch, key_length)`, a number beyond
        any other for padding; with a cache, keys and values are the cache's own
        tensors, except at index 0, where they are those of the new tokens. With
        both, `(outputs, scores, key_value)`. With a cache, `(what is said
        above, cache)`.

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

    whole_prompt_arguments = ("prefix_length",)

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        position: PositionScheme | None = None,
        causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        query_key_norm: bool = False,
        logit_soft_cap: float | None = None,
        attention_sinks: bool = False,
        output_gate: bool = False,
        cache_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads,
            num_key_value_heads,
            key_dim,
            value_dim,
            dropout=dropout,
            use_bias=use_bias,
            position=position,
            scale=scale,
            window=window,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            query_key_norm=query_key_norm,
            logit_soft_cap=logit_soft_cap,
            attention_sinks=attention_sinks,
            output_gate=output_gate,
            **kwargs,
        )
        # Here it may not be None.
        check_positive_int("num_key_value_heads", num_key_value_heads)
        self.causal = bool(causal)
        self.cache_dtype = cache_dtype
        self.cache_policy = make_cache_policy(window, cache_dtype)

    def build(
        self,
        query_shape: tuple,
        value_shape: tuple | None = None,
        key_shape: tuple | None = None,
    ) -> None:
        value_shape = value_shape or query_shape
        key_shape = key_shape or value_shape
        self._check_width(query_shape)
        value_heads = (self.num_key_value_heads, self._head_dims()[1])
        self.query_dense = self._project("query", self._query_heads(), query_shape)
        self.key_dense = self._project("key", self._key_heads(), key_shape)
        self.value_dense = self._project("value", value_heads, value_shape)
        self.query_norm = self._build_norm("query_norm")
        self.key_norm = self._build_norm("key_norm")
        self._build_output(query_shape)

    def _key_heads(self) -> tuple[int, int]:
        """How many key heads of which size are projected."""
        return self.num_key_value_heads, self._head_dims()[0]

    def _arrange(self, query: Any, key: Any) -> tuple[Any, Any]:
        """Makes of projected and encoded heads those that are attended with."""
        return query, key

    def create_cache(self, batch_size: int, max_length: int) -> Any:
        if self.key_dim is None:
            self._require_built()
        if not self.causal:
            raise ValueError(
                f"Layer '{self.name}' was made with `causal=False`: each new "
                "token changes the outputs of all earlier ones, so there is "
                "nothing to cache. Use it without a cache, or make it causal."
            )
        key_dim, value_dim = self._head_dims()
        heads = self.num_key_value_heads
        sizes = {"key": (heads, key_dim), "value": (heads, value_dim)}
        return self.cache_policy.create(
            batch_size, max_length, sizes, self.compute_dtype
        )

    def can_rewind(self, cache: Any, from_index: int, to_index: int) -> bool:
        return super().can_rewind(
            cache, from_index, to_index
        ) or self.cache_policy.can_rewind(cache, from_index, to_index)

    def __call__(  # type: ignore[override]
        self, query: Any, value: Any = None, key: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        # Keras's attention layers are called `layer(x, x)` for self-attention.
        if value is query and (key is None or key is query):
            value = key = None
        if args or key is not None:
            args = (value, key, *args)
        elif value is not None:
            args = (value,)
        return super().__call__(query, *args, **kwargs)

    def call(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        attention_mask: Any = None,
        padding_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        return_attention_scores: bool = False,
        return_key_value: bool = False,
        training: bool | None = None,
        prefix_length: Any = None,
        segment_ids: Any = None,
    ) -> Any:
        self._check_call(value, key, cache, cache_update_index, segment_ids)
        if attention_mask is not None:
            keys = next((x for x in (key, value) if x is not None), query)
            check_attention_mask(attention_mask, query, keys if cache is None else None)
        if padding_mask is not None:
            padding_mask = ops.cast(padding_mask, "bool")
        if prefix_length is not None:
            prefix_length = check_prefix_length(self.name, prefix_length, query)
        if segment_ids is not None:
            segment_ids = check_segment_ids(self.name, segment_ids, query)
        query = zero_padding(query, padding_mask)
        source = query if value is None else value
        q = self.query_dense(query)
        k = self.key_dense(source if key is None else key)
        v = self.value_dense(source)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        positions = token_positions(cache_update_index, ops.shape(query)[1])
        key_positions = positions
        key_padding_mask = padding_mask
        if value is not None or key is not None:
            key_positions = token_positions(None, ops.shape(k)[1])
            key_padding_mask = None
        if self.position is not None:
            q, k = self.position.encode(q, k, positions, key_positions)
        q, k = self._arrange(q, k)
        if cache is not None:
            k, v = (self.cache_policy.as_stored(x) for x in (k, v))
        past: Any = None
        # At index 0 there is no past: the new tokens attend to each other.
        if cache is not None and not is_zero(cache_update_index):
            stored = self.cache_policy.read(cache, k.dtype)
            past = stored["key"], stored["value"]
            past_positions = self.cache_policy.positions(cache, cache_update_index)
            if prefix_length is not None:
                key_positions = hide_padding(key_positions, padding_mask)
            key_positions = join_positions(past_positions, key_positions)
            # Else padding comes after all tokens whose outputs count.
            key_padding_mask = None
        visibility = Visibility(
            positions,
            key_positions,
            self.causal,
            self.window,
            key_padding_mask,
            attention_mask,
            prefix_length,
            None if segment_ids is None else (segment_ids, segment_ids),
            in_order=past is None,
        )
        outputs, scores = self._attend(
            query,
            q,
            (k, v),
            visibility,
            past,
            return_scores=return_attention_scores,
            training=training,
        )
        if cache is not None and prefix_length is not None:
            outputs = only_whole_prefixes(
                self.name, outputs, prefix_length, cache_update_index
            )
        returned: tuple = (outputs,)
        if return_attention_scores:
            if cache is not None:
                cut = ops.shape(scores)[-1] - ops.shape(k)[1]
                scores = self.cache_policy.place_scores(
                    cache,
                    None if past is None else scores[..., :cut],
                    scores[..., cut:],
                    cache_update_index,
                    padding_mask,
                )
            returned += (scores,)
        if cache is not None or return_key_value:
            k, v = to_cache_layout(k, v)
        if cache is not None:
            new = {"key": k, "value": v}
            new = {name: computed_after(x, outputs) for name, x in new.items()}
            write = (cache, new, cache_update_index)
            if return_key_value and past is not None:
                # What these queries attended to: the past and themselves.
                cache, seen, key_positions = self.cache_policy.write_and_read(
                    *write, positions, padding_mask
                )
                k, v = seen["key"], seen["value"]
            else:
                cache = self.cache_policy.write(*write, padding_mask)
        if return_key_value:
            packed = pack_key_value(
                ops.swapaxes(k, 2, 3), v, key_positions, key_padding_mask
            )
            returned += (packed,)
        outputs = returned if len(returned) > 1 else outputs
        return outputs if cache is None else (outputs, cache)

    def _check_call(
        self, value: Any, key: Any, cache: Any, index: Any, segment_ids: Any
    ) -> None:
        lengths = {static_size(x, 1) for x in (value, key) if x is not None}
        if len(lengths - {None}) > 1:
            raise ValueError(
                f"Layer '{self.name}' needs as many keys as values. Received: "
                f"value={describe(value)}, key={describe(key)}"
            )
        if cache is None:
            return
        if value is not None or key is not None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` and with "
                "`value` or `key`. Its cache holds the sequence it attends "
                "to: pass the new tokens as `query` alone. Received: value="
                f"{describe(value)}, key={describe(key)}"
            )
        self._check_cached_call(cache, index, segment_ids)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(causal=self.causal, cache_dtype=self.cache_dtype)
        return config
