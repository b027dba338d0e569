"""The decoder block whose parts come from hooks."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from attention import CachedLayer, CompositeCachedLayer, CrossAttention
from attention.contract import Shape, Tensor, clone_initializer, describe
from blocks.hooks import build_layer
from blocks.transformer_block import TransformerBlock


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CustomDecoder(TransformerBlock, CompositeCachedLayer):
    """A transformer decoder block with a hook for each of its parts.

    ```
    x ─┬─► attention_norm ─► self_attention ─► dropout ─► + ─┬─► ffn_norm ─► ffn ─► dropout ─► + ─►
       └──────────────────────────────────────────────────┘ └─────────────────────────────────┘
    ```

    Called with `encoder_sequence`, it has a third branch between these two, with
    `cross_attention_norm` and `cross_attention`.

    A subclass overrides `create_attention_layer`, `create_ffn` or `create_norm`
    to change a part, `transform` to change how they are connected, and
    `norm_names` to have other norms: `create_norm` makes one for each name, which
    the block then has under that name.

    Hooks run when the block is built: the subclass's attributes and the width
    of the inputs are known, and a layer made without `dtype=` gets the block's.
    There is no second forward pass: the block passes the KV cache and
    `cache_update_index` to its attention layers without looking into them.

    Of the `decoder_class` of a `blocks.CustomBackbone` (see there), the hooks that it
    doesn't override (and those of `super()` in the ones it does) are the backbone's.

    Attributes:
        norm_names: tuple of str. The norms, by the names that `transform` uses.
        cross_attention_norm_names: tuple of str. Further norms, of a block that attends
            to an encoder's outputs.
        layer_index: int or `None`. The block's depth in a `CustomBackbone`, from
            0, for the hooks to read; `None` outside of one.

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
        encoder_sequence: `None`, or tensor of shape `(batch, source_length,
            source_width)` that a cross-attention layer attends to, which
            `create_cross_attention_layer` makes when the block is first called
            with one. With a cache it is given once, and read from the cache then.
        encoder_padding_mask: `None`, or boolean tensor of shape `(batch,
            source_length)`: its real tokens.
        padding_mask: boolean tensor of shape `(batch, length)`: the real tokens,
            padded on the right.
        cache: a cache made by `create_cache`.
        cache_update_index: how many positions the cache holds.
        segment_ids: `None` or integer tensor of shape `(batch, length)`: the document of
            each token, in packed rows. Not with a cache.
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

    cross_attention_norm_names: tuple[str, ...] = ("cross_attention_norm",)
    layer_index: int | None = None
    # Made by `build` where the block is called with an encoder's outputs.
    cross_attention: CachedLayer | None
    _encoder_shape: Shape | None = None

    def create_cross_attention_layer(self, inputs_shape: Shape) -> CachedLayer:
        """Hook: makes the layer that attends to an encoder's outputs.

        It is called only where the block is called with `encoder_sequence`.

        Args:
            inputs_shape: tuple. The shape of the block's inputs.

        Returns:
            An `attention.CachedLayer` that takes `(x, encoder_sequence)` and
            `value_padding_mask`, as `attention.CrossAttention`.
        """
        if self._run_backbone_hook is not None:
            return self._run_backbone_hook("create_cross_attention_layer", inputs_shape)
        return CrossAttention(
            self.num_heads,
            self.num_key_value_heads,
            dropout=self.dropout,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(type(self).call).parameters)[1:]
        given = {**dict(zip(names, args)), **kwargs}
        encoded = given.get("encoder_sequence")
        if not self.built:
            # Keras tells `build` of the first argument only, unless all subclasses
            # had the same arguments.
            self._encoder_shape = None if encoded is None else tuple(encoded.shape)
        elif self.cross_attention is None and encoded is not None:
            raise ValueError(
                f"Block '{self.name}' was built without `encoder_sequence`, so it has no "
                "cross-attention, but is now called with one. Call it with "
                "`encoder_sequence` the first time, too. Received: encoder_sequence="
                f"{describe(encoded)}"
            )
        return super().__call__(*args, **kwargs)

    def build(self, inputs_shape: Shape, **source: Shape) -> None:
        """Makes the parts.

        Args:
            inputs_shape: tuple. The shape of the block's inputs.
            **source: `encoder_shape`, a tuple: the shape of the encoder's outputs. With
                it the block has cross-attention. The first call with `encoder_sequence`
                passes it by itself.
        """
        # Of a second named argument Keras would ask that `call` always has it.
        encoder_shape = source.pop("encoder_shape", self._encoder_shape)
        if source:
            raise TypeError(
                f"`build` takes `encoder_shape`. Received: {sorted(source)}"
            )
        super().build(inputs_shape)
        self._encoder_shape, self.cross_attention = encoder_shape, None
        if encoder_shape is None:
            return
        self._check_norm_names("cross_attention_norm_names")
        x_shape, encoder_shape = tuple(inputs_shape), tuple(encoder_shape)
        hook = "create_cross_attention_layer"
        attention = self._add_part("cross_attention", hook, x_shape)
        if not attention.built:
            attention.build(x_shape, encoder_shape)
        for name in self.cross_attention_norm_names:
            norm = self._add_part(name, "create_norm", x_shape)
            build_layer(norm, x_shape, self.compute_dtype)

    def compute_output_spec(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Keras traces a layer's call to know its outputs, which takes most of the time
        # that making a deep model takes. Blocks of one kind are traced once; those with
        # a `transform` of their own may do something else at each depth.
        plain = type(self).transform is CustomDecoder.transform and not args
        plain = plain and all(kwargs.get(name) is None for name in _NEEDS_TRACING)
        parts = ("self_attention", "ffn", *self.norm_names)
        kinds = tuple(type(getattr(self, name)) for name in parts)
        kind = (type(self), *kinds, tuple(x.shape), self.compute_dtype)
        if plain and kind in _TRACED:
            return keras.KerasTensor(x.shape, dtype=self.compute_dtype)
        outputs = super().compute_output_spec(x, *args, **kwargs)
        like = (x.shape, self.compute_dtype)
        found = (getattr(outputs, "shape", None), getattr(outputs, "dtype", None))
        if plain and found == like:
            _TRACED.add(kind)
        return outputs

    def get_build_config(self) -> dict[str, Any] | None:
        config = super().get_build_config()
        if config is None or self._encoder_shape is None:
            return config
        shapes = config.get("shapes_dict", config)
        inputs_shape = next(iter(shapes.values()))
        return {"input_shape": inputs_shape, "encoder_shape": self._encoder_shape}

    def build_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        self._encoder_shape = config.pop("encoder_shape", None)
        super().build_from_config(config)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.layer_index is not None:
            # For `clone_model`: a file holds the backbone instead.
            config["in_backbone"] = (self.layer_index, self._run_backbone_hook)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CustomDecoder:
        config = dict(config)
        place = config.pop("in_backbone", (None, None))
        decoder = super().from_config(config)
        decoder.layer_index, decoder._run_backbone_hook = place
        return decoder

    def transform(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        training: bool | None = None,
        encoder_sequence: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
    ) -> Any:
        """Computes the block's outputs: its topology, written once, in plain Keras.

        A subclass may name further arguments, which the block then takes, and
        return more than one tensor (see `attention.CompositeCachedLayer`).

        Its arguments are those of the call, without the cache.

        Returns:
            A tensor of the shape of `x`.
        """
        x = self.add_residual(
            x, self.attention_norm, self.self_attention, padding_mask=padding_mask
        )
        if self.cross_attention is not None:
            x = self.add_residual(
                x,
                self.cross_attention_norm,
                self.cross_attention,
                encoder_sequence,
                value_padding_mask=encoder_padding_mask,
                padding_mask=padding_mask,
            )
        return self.add_residual(x, self.ffn_norm, self.ffn)


_NEEDS_TRACING = ("cache", "encoder_sequence")
# The kinds of blocks that have been traced, and whose outputs are like `x`.
_TRACED: set[tuple] = set()
