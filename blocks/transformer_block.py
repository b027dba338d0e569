"""The arguments, hooks and parts that decoder and encoder blocks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from attention import CachedLayer, GroupedQueryAttention
from attention.contract import (
    Activation,
    Initializer,
    Shape,
    Tensor,
    check_fraction,
    check_optional_positive_int,
    check_positive_int,
    clone_initializer,
)
from blocks.hooks import build_layer, dtype_policy_scope, name_layer, run_hook
from blocks.layers.feed_forward import FeedForward


class TransformerBlock(keras.layers.Layer):
    """A block whose parts come from hooks; a subclass connects them.

    Attributes:
        norm_names: tuple of str. The norms, by the names that `transform` uses.
        causal: bool. Whether tokens see no later ones.
    """

    causal = True
    norm_names: tuple[str, ...] = ("attention_norm", "ffn_norm")
    # Of a backbone's `decoder_class`: runs the backbone's hook of a name.
    _run_backbone_hook: Callable | None = None
    # Made by `build`.
    residual_dropout: Callable

    def __init__(
        self,
        intermediate_dim: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        dropout: float = 0.0,
        activation: Activation = "gelu",
        layer_norm_epsilon: float = 1e-5,
        normalize_first: bool = True,
        kernel_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.intermediate_dim = check_positive_int("intermediate_dim", intermediate_dim)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.num_key_value_heads = check_optional_positive_int(
            "num_key_value_heads", num_key_value_heads
        )
        self.dropout = check_fraction("dropout", dropout)
        self.activation = keras.activations.get(activation)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.normalize_first = bool(normalize_first)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def create_attention_layer(self, inputs_shape: Shape) -> CachedLayer:
        """Hook: makes the self-attention layer.

        Args:
            inputs_shape: tuple. The shape of the block's inputs.

        Returns:
            An `attention.CachedLayer`.
        """
        if self._run_backbone_hook is not None:
            return self._run_backbone_hook("create_attention_layer", inputs_shape)
        return GroupedQueryAttention(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_heads,
            dropout=self.dropout,
            causal=self.causal,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
        )

    def create_ffn(self, inputs_shape: Shape) -> keras.layers.Layer:
        """Hook: makes the feed-forward layer, which keeps the width of its inputs."""
        if self._run_backbone_hook is not None:
            return self._run_backbone_hook("create_ffn", inputs_shape)
        return FeedForward(
            self.intermediate_dim,
            activation=self.activation,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
        )

    def create_norm(self, inputs_shape: Shape) -> keras.layers.Layer:
        """Hook: makes a normalization layer, which keeps the shape of its inputs.

        It is called once for each norm.
        """
        if self._run_backbone_hook is not None:
            return self._run_backbone_hook("create_norm", inputs_shape)
        return keras.layers.LayerNormalization(epsilon=self.layer_norm_epsilon)

    def build(self, inputs_shape: Shape) -> None:
        inputs_shape = tuple(inputs_shape)
        self._check_norm_names()
        hooks = {"self_attention": "create_attention_layer", "ffn": "create_ffn"}
        # The order of the weights.
        names = ("self_attention", *self.norm_names[:1], "ffn", *self.norm_names[1:])
        parts = [
            self._add_part(name, hooks.get(name, "create_norm"), inputs_shape)
            for name in names
        ]
        # Most models drop nothing, and a layer takes long to make and to call.
        self.residual_dropout = self._keep_all
        if self.dropout:
            self.residual_dropout = keras.layers.Dropout(
                self.dropout, dtype=self.dtype_policy, name="residual_dropout"
            )
        for layer in parts:
            build_layer(layer, inputs_shape, self.compute_dtype)

    def _add_part(self, name: str, hook: str, inputs_shape: Shape) -> Any:
        """Makes a hook's layer the block's attribute `name`, and returns it."""
        with dtype_policy_scope(self.dtype_policy):
            layer = run_hook(self, hook, inputs_shape)
        name_layer(layer, name)
        setattr(self, name, layer)
        return layer

    def _check_norm_names(self, attribute: str = "norm_names") -> None:
        names, where = getattr(self, attribute), f"`{type(self).__name__}.{attribute}`"
        if not isinstance(names, tuple) or not all(
            isinstance(name, str) and name.isidentifier() for name in names
        ):
            raise TypeError(
                f"{where} must be a tuple of names for attributes, such as "
                f'("attention_norm", "ffn_norm"). Received: {attribute}={names!r}'
            )
        # Once built, the block has its norms itself.
        attributes = {"self_attention", "ffn", *(() if self.built else dir(self))}
        taken = sorted({*attributes, "residual_dropout"} & set(names))
        if taken or len(set(names)) < len(names):
            raise ValueError(
                f"{where} must be distinct names, of which none is an attribute of the "
                f"block already. Received: {attribute}={names!r}"
                + (f", of which {taken} are taken" if taken else "")
            )

    def _keep_all(self, x: Tensor) -> Tensor:
        """Returns what a dropout layer of rate 0 does."""
        return ops.cast(x, self.compute_dtype)

    def add_residual(
        self, x: Tensor, norm: keras.layers.Layer, layer: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Runs a layer that keeps the shape, and adds its outputs to what went in.

        Args:
            x: tensor of shape `(batch, length, width)`.
            norm: the layer's norm; it comes before the layer if `normalize_first`
                is true, otherwise after the sum.
            layer: the layer.
            *args: further arguments of `layer`, also by keyword.

        Returns:
            A tensor of the shape of `x`.
        """
        if self.normalize_first:
            return x + self.residual_dropout(layer(norm(x), *args, **kwargs))
        return norm(x + self.residual_dropout(layer(x, *args, **kwargs)))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            intermediate_dim=self.intermediate_dim,
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            dropout=self.dropout,
            activation=keras.activations.serialize(self.activation),
            layer_norm_epsilon=self.layer_norm_epsilon,
            normalize_first=self.normalize_first,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            bias_initializer=keras.initializers.serialize(self.bias_initializer),
        )
        return config
