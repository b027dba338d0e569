"""The backbone whose parts come from hooks."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import keras
import keras_hub

from attention import (
    CachedLayer,
    CrossAttention,
    GroupedQueryAttention,
    PositionEmbedding,
)
from attention.contract import (
    DType,
    Shape,
    Tensor,
    check_fraction,
    check_optional_positive_int,
    check_positive_int,
    describe,
    hide_full_remat,
)
from blocks.custom_decoder import CustomDecoder
from blocks.generation.backbone_inputs import token_inputs
from blocks.hooks import dtype_policy_scope, float_policy, name_layer, run_hook
from blocks.layers.feed_forward import FeedForward, gelu_approximate
from blocks.lora import LowRankUpdates
from blocks.preset_files import written_aside
from blocks.presets import check_registered, make_from_config
from blocks.token_model import TokenModel


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CustomBackbone(LowRankUpdates, TokenModel, keras_hub.models.Backbone):
    """A decoder-only backbone with a hook for each of its parts.

    By default it is GPT-2's architecture. It is an ordinary functional KerasHub backbone,
    with presets, LoRA, quantization and `fit`.

    There are four ways to change it, from the least to the most:

    - override `create_attention_layer(inputs_shape, layer_index)`,
      `create_ffn(...)` or `create_norm(...)`: the same block with another part;
    - set `decoder_class`: another block, made with the backbone's sizes. Hooks
      that it doesn't override are the backbone's; those it does may read
      `self.layer_index`. It needs neither registering nor `get_config`, as files
      hold the backbone, which makes its blocks again;
    - override `create_decoder(layer_index)`: blocks of any kind;
    - override `transform(x, padding_mask)`: another way through the blocks.

    Hooks run inside `super().__init__(...)`: a subclass with attributes of its own sets
    them before that call. Register a subclass with
    `keras.saving.register_keras_serializable` to save and load it, and add its own
    arguments to `get_config`.

    Attributes:
        decoder_class: subclass of `blocks.CustomDecoder`. The class of the blocks.
        block_hook: str. The hook that makes the blocks of `transformer_layers`.
        normalize_first: bool. Whether norms come before the attention and the feed-forward
            layer, and after the last block; or after the residual additions.

    Weights are found by their paths, on which checkpoints rely: those of
    `token_embedding` (`embeddings`, and `reverse_embeddings` if logits have weights of
    their own), `position_embedding`, `layer_norm`, and of `transformer_layer_{i}` with
    `self_attention`, `ffn` and the names of its norms, such as
    `transformer_layer_0/self_attention/query/kernel`.

    Args:
        vocabulary_size: int. The number of tokens.
        num_layers: int. The number of blocks.
        num_heads: int. The number of query heads of each block.
        hidden_dim: int. The width.
        intermediate_dim: int. The width inside the feed-forward layers.
        num_key_value_heads: int or `None`, which means `num_heads`.
        max_sequence_length: int. The number of learned positions.
        dropout: float. The dropout rate.
        layer_norm_epsilon: float. The epsilon of the norms.
        learned_positions: bool. Whether there is a learned position embedding. A model whose
            attention carries the positions (rotary, ALiBi) passes `False`; its length then
            has no limit.
        tie_word_embeddings: bool. Whether the embedding is used for the logits, too.
        remat: `None` or `"block"`: training keeps what goes into each block, and computes
            a block again for its gradients: a third more time, and memory for the
            activations of one block instead of all.
        dtype: the dtype or dtype policy of all layers.
        **kwargs: arguments of `keras_hub.models.Backbone`: `name`, `trainable`.

    Call arguments:
        inputs: a dict of `token_ids` and `padding_mask`, integer tensors of shape `(batch,
            length)`; the mask is true for the real tokens, padded on the right.

    Returns:
        A tensor of shape `(batch, length, hidden_dim)`.

    Raises:
        TypeError: if a hook returns something that is no fitting layer, or an argument is
            not known.
        ValueError: if an argument is out of range, or heads do not divide.
        AttributeError: if a hook reads an attribute that is not yet set.

    Example:

    >>> import keras, numpy as np
    >>> from attention import RotaryAttention
    >>> from blocks import CustomBackbone
    >>> @keras.saving.register_keras_serializable(package="doctest")
    ... class RotaryBackbone(CustomBackbone):
    ...     def create_attention_layer(self, inputs_shape, layer_index):
    ...         return RotaryAttention(self.num_heads, self.num_key_value_heads)
    >>> backbone = RotaryBackbone(
    ...     vocabulary_size=100,
    ...     num_layers=2,
    ...     num_heads=4,
    ...     num_key_value_heads=2,
    ...     hidden_dim=16,
    ...     intermediate_dim=32,
    ...     learned_positions=False,
    ... )
    >>> tokens = np.ones((1, 5), dtype="int32")
    >>> outputs = backbone({"token_ids": tokens, "padding_mask": tokens})
    >>> outputs.shape == (1, 5, 16)
    True

    Reference:

    - [Radford et al., 2019](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
    """

    decoder_class: type[CustomDecoder] = CustomDecoder
    block_hook = "create_decoder"
    normalize_first = True

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_key_value_heads: int | None = None,
        max_sequence_length: int = 1024,
        dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        learned_positions: bool = True,
        tie_word_embeddings: bool = True,
        remat: str | None = None,
        dtype: DType = None,
        **kwargs: Any,
    ) -> None:
        self.check_rest(kwargs)
        # === Config: hooks read it ===
        self.vocabulary_size = check_positive_int("vocabulary_size", vocabulary_size)
        self.num_layers = check_positive_int("num_layers", num_layers)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.hidden_dim = check_positive_int("hidden_dim", hidden_dim)
        self.intermediate_dim = check_positive_int("intermediate_dim", intermediate_dim)
        self.num_key_value_heads = check_optional_positive_int(
            "num_key_value_heads", num_key_value_heads
        )
        self.max_sequence_length = check_positive_int(
            "max_sequence_length", max_sequence_length
        )
        self.dropout = check_fraction("dropout", dropout)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.learned_positions = bool(learned_positions)
        self.tie_word_embeddings = bool(tie_word_embeddings)
        if remat not in (None, "block"):
            raise ValueError(f"`remat` must be 'block' or None. Received: {remat!r}")
        self.remat = remat

        with dtype_policy_scope(float_policy(dtype)):
            self._create_layers()
            inputs, outputs = self._connect()
        super().__init__(inputs=inputs, outputs=outputs, dtype=dtype, **kwargs)

    def _create_layers(self) -> None:
        """Makes all layers, by the hooks."""
        with hide_full_remat():
            self.token_embedding = run_hook(self, "create_embedding")
            name_layer(self.token_embedding, "token_embedding")
            self.position_embedding = run_hook(self, "create_position_embedding")
            dropout = keras.layers.Dropout(self.dropout, name="embeddings_dropout")
            self.embeddings_dropout = dropout
        self.transformer_layers: list[CachedLayer] = []
        self._create_blocks(self.block_hook, "transformer_layer", self.num_layers)
        self.layer_norm = run_hook(self, "create_final_norm")
        name_layer(self.layer_norm, "layer_norm")

    def _create_blocks(self, hook: str, name: str, count: int) -> None:
        """Makes so many blocks by a hook, as the attribute `{name}s`."""
        blocks = getattr(self, f"{name}s")
        for i in range(count):
            with keras.RematScope("full") if self.remat else contextlib.nullcontext():
                block = run_hook(self, hook, i)
            # One block may be used at several depths.
            if not any(block is other for other in blocks):
                name_layer(block, f"{name}_{i}")
                if getattr(block, "layer_index", 0) is None:
                    block.layer_index = i
            blocks.append(block)

    def _connect(self) -> tuple[Any, Any]:
        """Returns the symbolic inputs, and the outputs that the layers make of them."""
        inputs = token_inputs()
        x = self.embed(inputs["token_ids"], inputs["padding_mask"])
        return inputs, self.layer_norm(self.transform(x, inputs["padding_mask"]))

    def embed(self, token_ids: Tensor, padding_mask: Tensor, side: str = "") -> Tensor:
        """Returns the embeddings of tokens, with the positions of a side."""
        x = self.token_embedding(token_ids)
        return self.embeddings_dropout(self.add_positions(x, padding_mask, side))

    def add_positions(self, x: Tensor, padding_mask: Tensor, side: str = "") -> Tensor:
        """Returns embeddings with the positions of a side, if it has some."""
        layer = getattr(self, f"{side}position_embedding")
        if layer is None:
            return x
        name_layer(layer, f"{side}position_embedding")
        add = keras.layers.Add(name=f"{side}embeddings_add")
        return add((x, layer(x, padding_mask=padding_mask)))

    def create_embedding(self) -> keras.layers.Layer:
        """Hook: makes the layer that embeds token ids.

        Called with `reverse=True` it turns hidden states into logits.
        """
        return keras.layers.ReversibleEmbedding(
            self.vocabulary_size,
            self.hidden_dim,
            tie_weights=self.tie_word_embeddings,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def create_position_embedding(self) -> CachedLayer | None:
        """Hook: makes the layer whose outputs are added to the embeddings.

        It is an `attention.CachedLayer`, or `None` where positions live in the attention.
        """
        if not self.learned_positions:
            return None
        return PositionEmbedding(
            self.max_sequence_length,
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def create_decoder(self, layer_index: int) -> CachedLayer:
        """Hook: makes a block; by default of the class `decoder_class`.

        Only a block of this default has the backbone's hooks: one that an
        overriding method makes itself has its own.

        Args:
            layer_index: int. The depth, from 0.

        Returns:
            An `attention.CachedLayer`, for instance a `blocks.CustomDecoder`. One
            of `self.transformer_layers`, where the blocks made so far are, is
            used again at this depth: with the same weights and another cache.
        """
        # A function, as Keras would take the backbone for a sublayer.
        run = functools.partial(_run_hook, self, layer_index)
        return self._make_block("decoder", CustomDecoder, run)

    def _make_block(self, side: str, base: type[Any], run_hook: Any) -> Any:
        """Makes a block of the class `{side}_class`, which has the backbone's hooks."""
        cls: Any = getattr(self, f"{side}_class")
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise TypeError(
                f"`{type(self).__name__}.{side}_class` must be a subclass of "
                f"`blocks.{base.__name__}`; override `create_{side}(layer_index)` to use "
                f"other blocks. Received: {side}_class={describe(cls)}"
            )
        block = cls(
            intermediate_dim=self.intermediate_dim,
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_heads,
            dropout=self.dropout,
            layer_norm_epsilon=self.layer_norm_epsilon,
        )
        block._run_backbone_hook = run_hook
        block.normalize_first = block.normalize_first and self.normalize_first
        return block

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        """Hook: makes the self-attention layer, a `CachedLayer`, of a block.

        Args:
            inputs_shape: tuple. The shape of the block's inputs.
            layer_index: int. The block's depth, from 0.
        """
        return GroupedQueryAttention(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_heads,
            dropout=self.dropout,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def create_cross_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        """Hook: makes the layer that attends to an encoder; as `create_attention_layer`."""
        return CrossAttention(
            self.num_heads,
            self.num_key_value_heads,
            dropout=self.dropout,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        """Hook: makes the feed-forward layer of a block; as `create_attention_layer`."""
        return FeedForward(
            self.intermediate_dim,
            activation=gelu_approximate,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        """Hook: makes a norm of a block; as `create_attention_layer`."""
        return keras.layers.LayerNormalization(epsilon=self.layer_norm_epsilon)

    def create_final_norm(self) -> keras.layers.Layer:
        """Hook: makes the normalization after the last block.

        By default it is another norm of the last block if `decoder_class` overrides
        `create_norm`, or else the backbone's for `layer_index=num_layers`; nothing without
        `normalize_first`.
        """
        if not self.normalize_first:
            return keras.layers.Identity(name="layer_norm")
        shape = (None, None, self.hidden_dim)
        last, cls = self.transformer_layers[-1], self.decoder_class
        if type(last) is cls and cls.create_norm is not CustomDecoder.create_norm:
            return run_hook(last, "create_norm", shape)
        return run_hook(self, "create_norm", shape, self.num_layers)

    def transform(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """Runs the blocks, which are in `self.transformer_layers`.

        Overridden where values flow between blocks: pass them on as arguments
        and results, not as attributes, or the functional model misses them.

        Args:
            x: tensor of shape `(batch, length, hidden_dim)`.
            padding_mask: integer tensor of shape `(batch, length)`.

        Returns:
            A tensor of the shape of `x`.
        """
        for decoder in self.transformer_layers:
            x = decoder(x, padding_mask=padding_mask)
        return x

    def save_to_preset(
        self, preset_dir: str, max_shard_size: float | None = 10
    ) -> None:
        """Saves the backbone and its weights to a folder.

        Its arguments are those of `CausalLM.save_to_preset`.

        Raises:
            ValueError: if the class is not registered with Keras; nothing is written.
        """
        check_registered(self)
        with written_aside(preset_dir, self.weights, max_shard_size) as folder:
            super().save_to_preset(folder, max_shard_size=max_shard_size)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CustomBackbone:
        return make_from_config(super().from_config, config)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            vocabulary_size=self.vocabulary_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            intermediate_dim=self.intermediate_dim,
            num_key_value_heads=self.num_key_value_heads,
            max_sequence_length=self.max_sequence_length,
            dropout=self.dropout,
            layer_norm_epsilon=self.layer_norm_epsilon,
            learned_positions=self.learned_positions,
            tie_word_embeddings=self.tie_word_embeddings,
        )
        return config if self.remat is None else {**config, "remat": self.remat}


def _run_hook(
    backbone: CustomBackbone, layer_index: int, name: str, inputs_shape: Shape
) -> keras.layers.Layer:
    return run_hook(backbone, name, inputs_shape, layer_index)
