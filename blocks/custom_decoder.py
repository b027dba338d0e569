"""The decoder block whose parts come from hooks."""

from __future__ import annotations

from typing import Any

import keras

from attention import (
    CachedLayer,
    CompositeCachedLayer,
    GroupedQueryAttention,
    check_fraction,
    check_positive_int,
    clone_initializer,
)
from blocks.feed_forward import FeedForward
from blocks.hooks import build_layer, dtype_policy_scope, name_layer, run_hook


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CustomDecoder(CompositeCachedLayer):
    """A transformer decoder block with a hook for each of its parts.

    ```
    x ─┬─► attention_norm ─► self_attention ─► dropout ─► + ─┬─► ffn_norm ─► ffn ─► dropout ─► + ─►
       └──────────────────────────────────────────────────┘ └─────────────────────────────────┘
    ```

    A subclass overrides `create_attention_layer`, `create_ffn` or
    `create_norm` to change a part, `transform` to change how they are
    connected. The class attribute `norm_names` says which norms there are:
    `create_norm` makes one for each name, under which the block then has it.

    Hooks run when the block is built: the subclass's attributes and the width
    of the inputs are known, and a layer made without `dtype=` gets the block's.
    There is no second forward pass: the block passes `cache` and
    `cache_update_index` through without looking into them.

    Attributes:
        norm_names: tuple of str. The norms, by the names that `transform` uses.

    Args:
        intermediate_dim: int. The width inside the feed-forward layer.
        num_heads: int. The number of query heads.
        num_key_value_heads: int or `None`. The number of key/value heads;
            `None` means `num_heads`.
        dropout: float. The dropout rate of the attention weights and of both
            residual branches.
        activation: the activation of the feed-forward layer.
        layer_norm_epsilon: float. The epsilon of the norms.
        normalize_first: bool. Whether norms come before the attention and the
            feed-forward layer (as in GPT-2) or after their residual additions.
        kernel_initializer: initializer of all kernels.
        bias_initializer: initializer of all biases.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        padding_mask: boolean tensor of shape `(batch, length)`: the real tokens,
            padded on the right.
        cache: a cache made by `create_cache`.
        cache_update_index: how many positions the cache has absorbed.
        training: bool. Whether to apply dropout.

    Returns:
        A tensor of shape `(batch, length, width)`; with a cache, `(tensor,
        cache)`.

    Raises:
        TypeError: if a hook returns no layer, or an attention layer that is no
            `attention.CachedLayer`, or `norm_names` is no tuple of names.
        ValueError: if the heads do not divide the width, or a name of a norm
            is taken.

    Example:

    A block with grouped-query attention and rotary positions.

    >>> import numpy as np
    >>> from keras import ops
    >>> from attention import RotaryAttention
    >>> from blocks import CustomDecoder
    >>> class RotaryDecoder(CustomDecoder):
    ...     def create_attention_layer(self, inputs_shape):
    ...         return RotaryAttention(self.num_heads, self.num_key_value_heads)
    >>> decoder = RotaryDecoder(
    ...     intermediate_dim=64, num_heads=4, num_key_value_heads=2
    ... )
    >>> x = np.random.normal(size=(1, 6, 16)).astype("float32")
    >>> outputs = decoder(x)
    >>> cache = decoder.create_cache(batch_size=1, max_length=6)
    >>> head, cache = decoder(x[:, :5], cache=cache, cache_update_index=0)
    >>> tail, cache = decoder(x[:, 5:], cache=cache, cache_update_index=5)
    >>> bool(ops.all(ops.isclose(tail, outputs[:, 5:], atol=1e-5)))
    True

    References:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    - [keras-hub issue #1261](https://github.com/keras-team/keras-hub/issues/1261)
    """

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

    def transform(self, x: Any, padding_mask: Any = None, training: Any = None) -> Any:
        """The block's topology, written once, in plain Keras.

        A subclass may name further arguments, which the block then takes, and
        return more than one tensor (see `attention.CompositeCachedLayer`).

        Args:
            x: tensor of shape `(batch, length, width)`.
            padding_mask: boolean tensor of shape `(batch, length)` or `None`.
            training: bool or `None`.

        Returns:
            A tensor of the same shape.
        """
        drop = self.residual_dropout
        if self.normalize_first:
            attended = self.self_attention(
                self.attention_norm(x), padding_mask=padding_mask
            )
            x = x + drop(attended)
            return x + drop(self.ffn(self.ffn_norm(x)))
        attended = self.self_attention(x, padding_mask=padding_mask)
        x = self.attention_norm(x + drop(attended))
        return self.ffn_norm(x + drop(self.ffn(x)))

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
