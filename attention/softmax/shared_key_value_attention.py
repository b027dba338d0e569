"""Attention to the keys and values that another layer computed."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import describe
from attention.contract.padding import zero_padding
from attention.contract.types import Cache, Index, Mask, Tensor
from attention.positions.arithmetic import token_positions
from attention.softmax.call_arguments import (
    check_attention_mask,
    check_key_value,
    check_segment_ids,
)
from attention.softmax.dot_product_attention import DotProductAttention
from attention.softmax.visibility import Visibility


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class SharedKeyValueAttention(DotProductAttention):
    """Attention that reads the keys and values of another attention layer.

    ```
    x ─► GroupedQueryAttention(return_key_value=True) ─┬───► key_value ───────────────┐
                                                       ▼                              ▼
                                     query ─► query_dense ─► encode ─► softmax(q·k + bias)·v ─► output_dense
    ```

    One layer, the producer, projects keys and values and stores them in its
    cache; layers above it have projections for queries and outputs only. Their
    own cache is `()`: what they attend to is stored once, by the producer. The
    call is the same in training and in decoding: keys are hidden by their
    positions, and the queries' follow from `cache_update_index`.

    Args:
        num_heads: int. The number of query heads.
        num_key_value_heads: int or `None`. The number of key/value heads of the
            producer; divides `num_heads`. `None`: as many as are given.
        key_dim: int or `None`. The size of each query and key head. `None`
            means the width of the inputs divided by `num_heads`.
        value_dim: int or `None`. The size of each value head; `None`: `key_dim`.
        position: `None` or a position scheme, such as `RotaryPosition()`; it
            encodes the queries. The keys come encoded by the producer's scheme.
        window: int or `None`. How many positions a query sees, itself included;
            not more than the producer's window. `None` means all of them.
        query_key_norm: bool. Whether queries are normalized, as the keys then are.
        **kwargs: as for `GroupedQueryAttention`.

    Call arguments:
        query: tensor of shape `(batch, length, width)`.
        key_value: a dict of `"key"`, of shape `(batch, num_key_value_heads,
            key_length, key_dim)`, `"value"`, of shape `(batch, num_key_value_heads,
            key_length, value_dim)`, and `"positions"`, an integer tensor of shape
            `(batch, key_length)`: those that `GroupedQueryAttention` returns with
            `return_key_value=True`. A query sees keys up to its own position.
        attention_mask: as for `GroupedQueryAttention`, and so are `padding_mask`,
            `cache_update_index`, `return_attention_scores` and `training`.
        cache: `()`, the cache made by `create_cache`.

    Returns:
        A tensor of shape `(batch, length, width)` in the compute dtype. With
        `return_attention_scores`, `(outputs, scores)`. With a cache,
        a tuple of these and of `()`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `key_value` has other entries, heads, sizes or rows than
            these queries can attend to.

    Example:

    >>> import numpy as np
    >>> from attention import GroupedQueryAttention, SharedKeyValueAttention
    >>> producer = GroupedQueryAttention(num_heads=4, num_key_value_heads=2)
    >>> reader = SharedKeyValueAttention(num_heads=4)
    >>> x = np.random.normal(size=(1, 5, 16)).astype("float32")
    >>> x, key_value = producer(x, return_key_value=True)
    >>> tuple(key_value["key"].shape)
    (1, 2, 5, 4)
    >>> reader(x, key_value).shape == (1, 5, 16)
    True
    >>> reader.create_cache(batch_size=1, max_length=32)
    ()

    References:

    - [Brandon et al., 2024](https://arxiv.org/abs/2405.12981)
    - [Sun et al., 2024](https://arxiv.org/abs/2405.05254)
    """

    def build(self, query_shape: tuple) -> None:
        self._check_width(query_shape)
        heads = (self.num_heads, self.head_dims()[0])
        self.query_dense = self.make_projection("query", heads, query_shape)
        self.query_norm = self.make_norm("query_norm")
        self.build_output(query_shape)

    def create_cache(self, batch_size: int, max_length: int) -> tuple:
        return ()

    def __call__(  # type: ignore[override]
        self, query: Tensor, key_value: Tensor = None, *args: Any, **kwargs: Any
    ) -> Any:
        # Before Keras looks into it: its own errors speak of nested arguments.
        check_key_value(self.name, key_value, query)
        return super().__call__(query, key_value, *args, **kwargs)

    def call(  # type: ignore[override]
        self,
        query: Tensor,
        key_value: Tensor,
        attention_mask: Mask = None,
        padding_mask: Mask = None,
        cache: Cache = None,
        cache_update_index: Index = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        segment_ids: Tensor = None,
    ) -> Any:
        self._check_heads(key_value)
        self._check_cached_call(cache, cache_update_index, segment_ids)
        segment_ids = check_segment_ids(self.name, segment_ids, query)
        check_attention_mask(attention_mask, query, None)
        query = zero_padding(query, padding_mask)
        q = self.project_query(query)  # (batch, length, num_heads, key_dim)
        key, value = ops.swapaxes(key_value["key"], 1, 2), key_value["value"]
        key_positions = ops.cast(key_value["positions"], "int32")
        length = ops.shape(query)[1]
        positions = token_positions(cache_update_index, length, segment_ids)
        # No new keys: these were encoded by the layer that made them.
        no_keys = {"key": key[:, :0]}
        q, _ = self.encode_positions(q, no_keys, positions, key_positions[:, :0])
        visibility = Visibility(
            positions,
            key_positions,
            policy=self.cache_policy,
            attention_mask=attention_mask,
            segment_ids=None if segment_ids is None else (segment_ids, segment_ids),
            in_order=True,
        )
        new = past = None
        if cache is None:
            # A whole sequence is attended as its producer does.
            new = {"key": key, "value": ops.swapaxes(value, 1, 2)}
        else:
            past = {"key": ops.transpose(key, (0, 2, 3, 1)), "value": value}
        options = (visibility, return_attention_scores, training)
        outputs = self._attend_and_project(q, new, past, *options, inputs=query)
        outputs = outputs if return_attention_scores else outputs[0]
        return outputs if cache is None else (outputs, cache)

    def _check_heads(self, key_value: Tensor) -> None:
        """Raises an error if keys or values are not those these queries are for."""
        key_dim, value_dim = self.head_dims()
        groups = key_value["key"].shape[1]
        dims = (key_value["key"].shape[3], key_value["value"].shape[3])
        wanted = self.num_key_value_heads or groups
        if groups != wanted or self.num_heads % groups or dims != (key_dim, value_dim):
            raise ValueError(
                f"Layer '{self.name}' has num_heads={self.num_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}, key_dim={key_dim} "
                f"and value_dim={value_dim}, which does not fit these keys and "
                f"values. Received: key_value={describe(key_value)}. Give it the "
                "head sizes of the layer that made them, and a `num_heads` that "
                "their number of heads divides."
            )
