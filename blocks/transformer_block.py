"""What decoder and encoder blocks share: their arguments, hooks and parts."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, GroupedQueryAttention
from attention.contract import check_fraction, check_positive_int, clone_initializer
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

    def __init__(
        self,
        intermediate_dim: int,
        num_heads: int,
        num_key_value_heads: int | None = None,
        dropout: float = 0.0,
        activation: Any = "gelu",
        layer_norm_epsilon: float = 1e-5,
        normalize_first: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.intermediate_dim = check_positive_int("intermediate_dim", intermediate_dim)
        self.num_heads = check_positive_int("num_heads", num_heads)
        if num_key_value_heads is not None:
            check_positive_int("num_key_value_heads", num_key_value_heads)
        self.num_key_value_heads = num_key_value_heads
        self.dropout = check_fraction("dropout", dropout)
        self.activation = keras.activations.get(activation)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.normalize_first = bool(normalize_first)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def create_attention_layer(self, inputs_shape: tuple) -> CachedLayer:
        """Hook: makes the self-attention layer.

        Args:
            inputs_shape: tuple. The shape of the block's inputs.

        Returns:
            An `attention.CachedLayer`.
        """
        num_key_value_heads = self.num_key_value_heads
        if num_key_value_heads is None:
            num_key_value_heads = self.num_heads
        return GroupedQueryAttention(
            num_heads=self.num_heads,
            num_key_value_heads=num_key_value_heads,
            dropout=self.dropout,
            causal=self.causal,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
        )

    def create_ffn(self, inputs_shape: tuple) -> keras.layers.Layer:
        """Hook: makes the feed-forward layer.

        Args:
            inputs_shape: tuple. The shape of the block's inputs.

        Returns:
            A layer that keeps the width.
        """
        return FeedForward(
            self.intermediate_dim,
            activation=self.activation,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
        )

    def create_norm(self, inputs_shape: tuple) -> keras.layers.Layer:
        """Hook: makes a normalization layer; called once for each norm.

        Args:
            inputs_shape: tuple. The shape of the block's inputs.

        Returns:
            A layer that keeps the shape.
        """
        return keras.layers.LayerNormalization(epsilon=self.layer_norm_epsilon)

    def build(self, inputs_shape: tuple) -> None:
        inputs_shape = tuple(inputs_shape)
        self._check_norm_names()
        with dtype_policy_scope(self.dtype_policy):
            # In the order of the weights: attention, a norm, ffn, other norms.
            attention = run_hook(
                self, "create_attention_layer", inputs_shape, cached=True
            )
            self.self_attention = name_layer(attention, "self_attention")
            layers = [self.self_attention, *self._add_norms(inputs_shape, slice(1))]
            self.ffn = name_layer(run_hook(self, "create_ffn", inputs_shape), "ffn")
            layers += [self.ffn, *self._add_norms(inputs_shape, slice(1, None))]
            self.residual_dropout = keras.layers.Dropout(
                self.dropout, name="residual_dropout"
            )
        for layer in layers:
            build_layer(layer, inputs_shape, self.compute_dtype)

    def _add_norms(self, inputs_shape: tuple, which: slice) -> list:
        norms = []
        for name in self.norm_names[which]:
            norm = name_layer(run_hook(self, "create_norm", inputs_shape), name)
            setattr(self, name, norm)
            norms.append(norm)
        return norms

    def _check_norm_names(self) -> None:
        names = self.norm_names
        if not isinstance(names, tuple) or not all(
            isinstance(name, str) and name.isidentifier() for name in names
        ):
            raise TypeError(
                f"`{type(self).__name__}.norm_names` must be a tuple of names for "
                'attributes, such as ("attention_norm", "ffn_norm"). Received: '
                f"norm_names={names!r}"
            )
        taken = {"self_attention", "ffn", "residual_dropout"}
        # Once built, the block has its norms itself.
        taken.update(() if self.built else dir(self))
        taken.intersection_update(names)
        if taken or len(set(names)) < len(names):
            raise ValueError(
                f"`{type(self).__name__}.norm_names` must be distinct names, of which "
                "none is an attribute of the block already. Received: norm_names="
                f"{names!r}"
                + (f", of which {sorted(taken)} are taken" if taken else "")
            )

    def connect(self, x: Any, branches: list) -> Any:
        """Runs residual branches, each with its norm in front or behind.

        Args:
            x: tensor of shape `(batch, length, width)`.
            branches: pairs of a norm and a function.
        """
        for norm, branch in branches:
            if self.normalize_first:
                x = x + self.residual_dropout(branch(norm(x)))
            else:
                x = norm(x + self.residual_dropout(branch(x)))
        return x

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
