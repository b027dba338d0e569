"""What attention layers share: heads, projections and one way of attending."""

from __future__ import annotations

import numbers
from typing import Any

import keras
from keras import ops

from attention.cached_layer import CachedLayer
from attention.dot_product import (
    combine_masks,
    fused_attention,
    fused_attention_applies,
    grouped_attention,
    scale_query,
)
from attention.initializers import clone_initializer
from attention.key_value_cache import to_cache_layout
from attention.position_schemes import (
    PositionScheme,
    check_position,
    serialize_position,
)
from attention.validation import check_fraction, check_positive_int, describe


class DotProductAttention(CachedLayer):
    """A layer whose queries attend to keys and values of whatever origin.

    A subclass says where keys and values come from: it makes its projections
    in `build`, and its `call` ends with `_attend`. Its constructor arguments are
    those of `GroupedQueryAttention`.
    """

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        position: PositionScheme | None = None,
        scale: float | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = check_positive_int("num_heads", num_heads)
        if num_key_value_heads is not None:
            num_key_value_heads = check_positive_int(
                "num_key_value_heads", num_key_value_heads
            )
            if num_heads % num_key_value_heads:
                raise ValueError(
                    "`num_heads` must be divisible by `num_key_value_heads`, so that "
                    "each key/value head serves as many query heads. Received: "
                    f"num_heads={num_heads}, num_key_value_heads={num_key_value_heads}"
                )
        self.num_key_value_heads = num_key_value_heads
        if key_dim is not None:
            key_dim = check_positive_int("key_dim", key_dim)
        if value_dim is not None:
            value_dim = check_positive_int("value_dim", value_dim)
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.dropout = check_fraction("dropout", dropout)
        self.use_bias = bool(use_bias)
        self.position = check_position(position)
        if self.position is not None:
            self.position.num_layers += 1
        if scale is not None and not isinstance(scale, numbers.Real):
            raise TypeError(
                "`scale` must be a number or None, which means 1 / sqrt(key_dim). "
                f"Received: scale={describe(scale)}"
            )
        self.scale = scale if scale is None else float(scale)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        # Whether a query attends to no later position.
        self.causal = True

    def _check_width(self, query_shape: tuple) -> None:
        """Notes the width of the inputs, or says why it does not fit."""
        width = query_shape[-1]
        if len(query_shape) != 3 or width is None:
            raise ValueError(
                f"Layer '{self.name}' needs inputs of shape (batch, length, "
                f"width) with a known width. Received: shape {tuple(query_shape)}"
            )
        if self.key_dim is None and width % self.num_heads:
            raise ValueError(
                f"With `key_dim=None`, the width of the inputs of layer "
                f"'{self.name}' must be divisible by `num_heads`. Received: "
                f"num_heads={self.num_heads}, inputs of shape "
                f"{tuple(query_shape)}. Pass `key_dim`, or another `num_heads`."
            )
        self._width = width

    def _head_dims(self) -> tuple[int, int]:
        """The sizes of a key head and of a value head."""
        key_dim = self.key_dim or self._width // self.num_heads
        return key_dim, self.value_dim or key_dim

    def _project(self, name: str, heads: tuple, shape: tuple) -> keras.layers.Layer:
        """Makes a projection of `(batch, length, width)` to `heads`."""
        if self.use_bias and heads[1] == 1 and heads[0] > 1:
            # Keras adds a bias of shape (heads, 1) along the length, on
            # TensorFlow, where there happen to be as many tokens as heads.
            raise ValueError(
                f"Layer '{self.name}' would have {heads[0]} heads of size 1 with a "
                f"bias as its {name}, which Keras computes wrongly on TensorFlow. "
                "Use heads of size 2 or more, or `use_bias=False`."
            )
        dense = keras.layers.EinsumDense(
            "blw,whd->blhd",
            output_shape=(None, *heads),
            bias_axes="hd" if self.use_bias else None,
            name=name,
            **self._initializers(),
        )
        dense.build(shape)
        return dense

    def _build_output(self, query_shape: tuple) -> None:
        """Makes what comes behind the queries: dropout, bias, output projection."""
        key_dim, value_dim = self._head_dims()
        self._logit_scale = key_dim**-0.5 if self.scale is None else self.scale
        # The letters of what is contracted are in the order of the axes: JAX sorts
        # them, and would else transpose the kernel in every decode step.
        self.output_dense = keras.layers.EinsumDense(
            "bqhk,hkw->bqw",
            output_shape=(None, query_shape[-1]),
            bias_axes="w" if self.use_bias else None,
            name="attention_output",
            **self._initializers(),
        )
        self.output_dense.build((*query_shape[:2], self.num_heads, value_dim))
        self.dropout_layer = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="attention_dropout"
        )
        if self.position is not None and not self.position.built:
            self.position.build(self.num_heads)

    def _initializers(self) -> dict[str, Any]:
        # A random initializer with a seed would give every kernel the same
        # values if it were shared.
        return {
            "kernel_initializer": clone_initializer(self.kernel_initializer),
            "bias_initializer": clone_initializer(self.bias_initializer),
            "dtype": self.dtype_policy,
        }

    def _attend(
        self,
        query: Any,
        new: tuple[Any, Any] | None,
        query_positions: Any,
        key_positions: Any,
        past: tuple[Any, Any] | None = None,
        key_padding_mask: Any = None,
        attention_mask: Any = None,
        return_scores: bool = False,
        training: bool | None = None,
    ) -> tuple[Any, Any]:
        """Attends to keys by positions, and projects what was found.

        Args:
            query: tensor of shape `(batch, length, num_heads, key_dim)`.
            new: `None`, or keys and values of shape `(batch, key_length,
                num_key_value_heads, dim)`.
            query_positions: `int32` tensor, `(length,)` or `(batch, length)`.
            key_positions: likewise for all keys, the past ones first.
            past: `None`, or keys and values as in a cache: `(batch,
                num_key_value_heads, key_dim, key_length)` and `(batch,
                num_key_value_heads, key_length, value_dim)`.
            key_padding_mask: `None` or boolean tensor `(batch, key_length)`.
            attention_mask: `None` or boolean tensor `(batch, length, positions)`.
            return_scores: bool. Whether the scores are needed.
            training: bool. Whether to apply dropout.

        Returns:
            The outputs, `(batch, length, width)`, and the scores or `None`.
        """
        mask = combine_masks(
            query_positions,
            key_positions,
            self.causal,
            key_padding_mask,
            attention_mask,
            in_order=past is None or new is None,
        )
        bias = None
        if self.position is not None:
            bias = self.position.bias(query_positions, key_positions)
            self._check_bias(bias)
        dropout = self.dropout_layer if training and self.dropout else None
        query, scale = scale_query(query, self._logit_scale)
        scores = None
        plain = past is None and not return_scores and dropout is None
        if plain and new is not None and self._is_fused(new[0].shape[2]):
            outputs = fused_attention(query, new[0], new[1], mask, bias, scale)
        else:
            parts = [] if past is None else [past]
            if new is not None:
                parts.append(to_cache_layout(*new))
            outputs, scores = grouped_attention(
                query, parts, mask, bias, scale, dropout
            )
        if attention_mask is not None:
            # A query that may attend to nothing attends to nothing. Softmax
            # would have given it the mean of all values, later ones too.
            some = ops.any(mask, axis=-1, keepdims=True)
            outputs = ops.where(ops.swapaxes(some, 1, 2), outputs, 0)
            scores = None if scores is None else ops.where(some, scores, 0)
        return self.output_dense(outputs), scores

    def _is_fused(self, groups: int) -> bool:
        return fused_attention_applies(
            self.num_heads, groups, *self._head_dims(), self.compute_dtype
        )

    def _check_bias(self, bias: Any) -> None:
        heads = None if bias is None else bias.shape[-3]
        if heads not in (None, 1, self.num_heads):
            raise ValueError(
                f"`position` of layer '{self.name}' gave biases for {heads} heads, "
                f"but the layer has num_heads={self.num_heads}. Layers that share "
                "a position scheme need the same number of heads."
            )

    def _check_index(self, cache_update_index: Any) -> None:
        """Says so when the positions of the queries are not known."""
        if cache_update_index is None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` but without "
                "`cache_update_index`, which would only read the cache; but "
                "the positions of the queries are not known then. Pass the "
                "number of positions that the cache has absorbed."
            )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            dropout=self.dropout,
            use_bias=self.use_bias,
            position=serialize_position(self.position),
            scale=self.scale,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            bias_initializer=keras.initializers.serialize(self.bias_initializer),
        )
        return config
