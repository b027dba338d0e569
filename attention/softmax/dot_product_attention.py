"""What attention layers share: heads, projections and one way of attending."""

from __future__ import annotations

import numbers
from typing import Any

import keras
from keras import ops

from attention.contract.arguments import (
    check_fraction,
    check_positive_int,
    check_soft_cap,
    describe,
)
from attention.contract.cached_layer import CachedLayer
from attention.contract.checks import check_sequence_shape
from attention.contract.initializers import clone_initializer
from attention.positions.position_scheme import (
    PositionScheme,
    check_position,
    serialize_position,
)
from attention.softmax.filled_slots import attend_to_filled
from attention.softmax.kernels import (
    fused_attention,
    fused_attention_applies,
    grouped_attention,
    scale_query,
)
from attention.softmax.key_value import to_cache_layout
from attention.softmax.visibility import Visibility


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
        window: int | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        query_key_norm: bool = False,
        logit_soft_cap: float | None = None,
        attention_sinks: bool = False,
        output_gate: bool = False,
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
        self.window = None if window is None else check_positive_int("window", window)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.query_key_norm = bool(query_key_norm)
        self.logit_soft_cap = check_soft_cap(logit_soft_cap)
        self.attention_sinks = bool(attention_sinks)
        self.output_gate = bool(output_gate)
        # Made by `build` where they are asked for.
        self.query_norm = self.key_norm = self.sinks = self.gate_dense = None
        # Whether a query attends to no later position.
        self.causal = True

    def _check_width(self, query_shape: tuple) -> None:
        """Notes the width of the inputs, or says why it does not fit."""
        check_sequence_shape(self.name, query_shape)
        width = query_shape[-1]
        if self.key_dim is None and width % self.num_heads:
            raise ValueError(
                f"With `key_dim=None`, the width of the inputs of layer "
                f"'{self.name}' must be divisible by `num_heads`. Received: "
                f"num_heads={self.num_heads}, inputs of shape "
                f"{tuple(query_shape)}. Pass `key_dim`, or another `num_heads`."
            )
        self._width = width

    def _head_dims(self) -> tuple[int, int]:
        """The sizes of a key head and of a value head, as they are attended."""
        key_dim = self.key_dim or self._width // self.num_heads
        return key_dim, self.value_dim or key_dim

    def _query_heads(self) -> tuple[int, int]:
        """How many query heads of which size are projected."""
        return self.num_heads, self._head_dims()[0]

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
        value_dim = self._head_dims()[1]
        heads, key_dim = self._query_heads()
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
            self.position.build(heads)
        if self.output_gate:
            gates = (self.num_heads, value_dim)
            self.gate_dense = self._project("output_gate", gates, query_shape)
        if self.attention_sinks:
            # Beside float32 logits, whatever the layer computes in.
            self.sinks = self.add_weight(
                name="sinks",
                shape=(heads,),
                initializer="zeros",
                autocast=False,
            )

    def _build_norm(self, name: str) -> keras.layers.Layer | None:
        """Makes the norm of query or key heads, if there is to be one."""
        return self._norm(name, self._query_heads()[1]) if self.query_key_norm else None

    def _norm(self, name: str, size: int, epsilon: float = 1e-6) -> keras.layers.Layer:
        """Makes a norm by the root mean square along the last axis."""
        norm = keras.layers.RMSNormalization(
            epsilon=epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build((None, None, size))
        return norm

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
        inputs: Any,
        query: Any,
        new: tuple[Any, Any] | None,
        visibility: Visibility,
        past: tuple[Any, Any] | None = None,
        return_scores: bool = False,
        training: bool | None = None,
    ) -> tuple[Any, Any]:
        """Attends to what is visible, and projects what was found.

        Args:
            inputs: tensor of shape `(batch, length, width)`: what queries were made
                of.
            query: tensor of shape `(batch, length, num_heads, key_dim)`.
            new: `None`, or keys and values of shape `(batch, key_length,
                num_key_value_heads, dim)`.
            visibility: which query sees which key, the past ones first.
            past: `None`, or keys and values as in a cache: `(batch,
                num_key_value_heads, key_dim, key_length)`, or `TokensFirst`, and
                `(batch, num_key_value_heads, key_length, value_dim)`.
            return_scores: bool. Whether the scores are needed.
            training: bool. Whether to apply dropout.

        Returns:
            The outputs, `(batch, length, width)`, and the scores or `None`.
        """
        outputs, scores = self._combine(
            *self._attend_heads(query, new, visibility, past, return_scores, training)
        )
        return self._project_output(outputs, inputs), scores

    def _combine(self, outputs: Any, scores: Any) -> tuple[Any, Any]:
        """Makes of the heads that attended those that are projected."""
        return outputs, scores

    def _project_output(self, outputs: Any, inputs: Any) -> Any:
        """Lets through what the gate does, if there is one, and projects it."""
        if self.gate_dense is not None:
            outputs = outputs * ops.sigmoid(self.gate_dense(inputs))
        return self.output_dense(outputs)

    def _attend_heads(
        self,
        query: Any,
        new: tuple[Any, Any] | None,
        visibility: Visibility,
        past: tuple[Any, Any] | None = None,
        return_scores: bool = False,
        training: bool | None = None,
    ) -> tuple[Any, Any]:
        """Means of values, `(batch, length, num_heads, value_dim)`, and weights."""
        if past is None and new is not None and not return_scores:
            blocks = visibility.blocks(query, new[0])
            if blocks is not None:
                # In time linear in the length; blocks are not cut again.
                outputs, scores = self._attend_heads(
                    blocks.queries(query),
                    (blocks.keys(new[0]), blocks.keys(new[1])),
                    visibility.in_blocks(blocks, query),
                    training=training,
                )
                return blocks.join(outputs), scores
        mask, bias = visibility.mask(), None
        if self.position is not None:
            bias = self.position.bias(
                visibility.query_positions, visibility.key_positions
            )
            self._check_bias(bias)
        dropout = self.dropout_layer if training and self.dropout else None
        query, scale = scale_query(query, self._logit_scale)
        scores = None

        def attend(past: Any, mask: Any, bias: Any) -> tuple[Any, Any]:
            parts = [] if past is None else [past]
            if new is not None:
                parts.append(to_cache_layout(*new))
            return grouped_attention(
                query,
                parts,
                mask,
                bias,
                scale,
                dropout,
                soft_cap=self.logit_soft_cap,
                sinks=self.sinks,
            )

        plain = not return_scores and dropout is None
        if plain and new is not None and past is not None:
            outputs = attend_to_filled(
                lambda *args: attend(*args)[0],
                past,
                mask,
                bias,
                visibility.key_positions,
            )
        elif plain and new is not None and self._is_fused(query, *new):
            outputs = fused_attention(query, new[0], new[1], mask, bias, scale)
        else:
            outputs, scores = attend(past, mask, bias)
        if visibility.may_be_empty:
            # A query that may attend to nothing attends to nothing. Softmax
            # would have given it the mean of all values, later ones too.
            some = ops.any(mask, axis=-1, keepdims=True)
            outputs = ops.where(ops.swapaxes(some, 1, 2), outputs, 0)
            scores = None if scores is None else ops.where(some, scores, 0)
        return outputs, scores

    def _is_fused(self, query: Any, key: Any, value: Any) -> bool:
        if self.logit_soft_cap is not None or self.sinks is not None:
            return False
        heads, groups, dims = (
            query.shape[2],
            key.shape[2],
            (key.shape[3], value.shape[3]),
        )
        return fused_attention_applies(heads, groups, *dims, self.compute_dtype)

    def _check_bias(self, bias: Any) -> None:
        found, heads = None if bias is None else bias.shape[-3], self._query_heads()[0]
        if found not in (None, 1, heads):
            raise ValueError(
                f"`position` of layer '{self.name}' gave biases for {found} heads, "
                f"but the layer has num_heads={heads}. Layers that share "
                "a position scheme need the same number of heads."
            )

    def _require_built(self) -> None:
        """Says so when sizes depend on inputs that were not seen yet."""
        if not self.built:
            raise ValueError(
                f"Layer '{self.name}' has no weights yet and no `key_dim`, so its "
                "cache can't be sized. Call it once, or call `build` with the shape of "
                "its inputs, before `create_cache`; or make it with `key_dim`."
            )

    def _check_cached_call(self, cache: Any, index: Any, segment_ids: Any) -> None:
        """Says so when a call with a cache lacks something, or has too much."""
        if cache is None:
            return
        if index is None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` but without "
                "`cache_update_index`, which would only read the cache; but "
                "the positions of the queries are not known then. Pass the "
                "number of positions that the cache has absorbed."
            )
        if segment_ids is not None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` and `segment_ids`. A "
                "cache holds one document in each row; give each its own row."
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
            window=self.window,
            query_key_norm=self.query_key_norm,
            logit_soft_cap=self.logit_soft_cap,
            attention_sinks=self.attention_sinks,
            output_gate=self.output_gate,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            bias_initializer=keras.initializers.serialize(self.bias_initializer),
        )
        return config
