"""The bidirectional encoder whose parts come from hooks."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops

from attention import CachedLayer, GroupedQueryAttention
from attention.contract import Shape, Tensor, check_optional_positive_int
from blocks.custom_backbone import CustomBackbone, _run_hook
from blocks.custom_encoder import CustomEncoder
from blocks.generation.backbone_inputs import token_inputs
from blocks.hooks import name_layer, run_hook
from blocks.layers.feed_forward import FeedForward, published_activation

TYPES = "token_type_ids"


class TokenTypes:
    """A model of tokens that may have types, which are 0 where none are given."""

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # On JAX Keras trains and predicts by it.
        return super().call(self.complete(inputs), *args, **kwargs)  # type: ignore[misc]

    def complete(self, inputs: Any) -> Any:
        inputs = super().complete(inputs)  # type: ignore[misc]
        asked: Any = self.input  # type: ignore[attr-defined]
        if isinstance(inputs, dict) and set(asked) - set(inputs) == {TYPES}:
            # An array where the others are, or a tensor.
            return {**inputs, TYPES: inputs["token_ids"] * 0}
        return inputs


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CustomEncoderBackbone(TokenTypes, CustomBackbone):
    """A bidirectional encoder with a hook for each of its parts.

    ```
    token_ids ─► token, token type and position embeddings ─► + ─► embeddings_norm ─►
    transformer_layers ─► layer_norm ─►
    ```

    By default it is BERT's architecture. Every token sees all others of its row, so there
    is no cache: `blocks.MaskedLM`, `blocks.TextClassifier`, `blocks.TokenClassifier` and
    `blocks.TextEmbedder` are its tasks.

    The hooks are those of `blocks.CustomBackbone`, whose `create_attention_layer` returns
    a layer made with `causal=False` here; for blocks there are `encoder_class` and
    `create_encoder` instead of `decoder_class` and `create_decoder`.

    Attributes:
        encoder_class: subclass of `blocks.CustomEncoder`. The class of the blocks.

    Weights have the paths of `CustomBackbone`, `token_type_embedding/embeddings` and those
    of `embeddings_norm`.

    Args:
        vocabulary_size: int. The number of tokens.
        num_layers: int. The number of blocks.
        num_heads: int. The number of query heads of each block.
        hidden_dim: int. The width.
        intermediate_dim: int. The width inside the feed-forward layers.
        num_token_types: int or `None`. How many types of tokens there are, such as those
            of the first and the second text; `None`: types have no embedding. Only with
            more than one the model takes `token_type_ids`.
        normalize_first: bool. Whether norms come before the attention and the
            feed-forward layer, and after the last block, or after the residual additions.
        activation: str. See `blocks.layers.feed_forward.published_activation`.
        max_sequence_length: int. The number of learned positions.
        layer_norm_epsilon: float. The epsilon of the norms.
        **kwargs: as for `blocks.CustomBackbone`.

    Call arguments:
        inputs: a dict of `token_ids`, `padding_mask` and `token_type_ids`, integer tensors
            of shape `(batch, length)`; the mask is true for the real tokens, padded on the
            right, and types that are not given are 0.

    Returns:
        A tensor of shape `(batch, length, hidden_dim)`.

    Raises:
        TypeError: if a hook returns something that is no fitting layer.
        ValueError: if an argument is out of range, heads do not divide, or an attention
            layer is causal.

    Example:

    >>> import keras, numpy as np
    >>> from attention import RotaryAttention
    >>> from blocks import CustomEncoderBackbone
    >>> @keras.saving.register_keras_serializable(package="doctest")
    ... class RotaryEncoder(CustomEncoderBackbone):
    ...     def create_attention_layer(self, inputs_shape, layer_index):
    ...         return RotaryAttention(self.num_heads, causal=False)
    >>> backbone = RotaryEncoder(
    ...     vocabulary_size=100,
    ...     num_layers=2,
    ...     num_heads=4,
    ...     hidden_dim=16,
    ...     intermediate_dim=32,
    ...     learned_positions=False,
    ... )
    >>> tokens = np.ones((1, 5), dtype="int32")
    >>> outputs = backbone({"token_ids": tokens, "padding_mask": tokens})
    >>> outputs.shape == (1, 5, 16)
    True

    Reference:

    - [Devlin et al., 2018](https://arxiv.org/abs/1810.04805)
    """

    encoder_class: type[CustomEncoder] = CustomEncoder
    block_hook = "create_encoder"

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_token_types: int | None = 2,
        normalize_first: bool = False,
        activation: str = "gelu",
        max_sequence_length: int = 512,
        layer_norm_epsilon: float = 1e-12,
        **kwargs: Any,
    ) -> None:
        self.num_token_types = check_optional_positive_int(
            "num_token_types", num_token_types
        )
        self.normalize_first = bool(normalize_first)
        self.activation = activation
        published_activation(activation)
        super().__init__(
            vocabulary_size,
            num_layers,
            num_heads,
            hidden_dim,
            intermediate_dim,
            max_sequence_length=max_sequence_length,
            layer_norm_epsilon=layer_norm_epsilon,
            **kwargs,
        )

    def _create_layers(self) -> None:
        super()._create_layers()
        self.token_type_embedding = None
        if self.num_token_types:
            self.token_type_embedding = keras.layers.Embedding(
                self.num_token_types,
                self.token_embedding.output_dim,
                embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
                name="token_type_embedding",
            )
        self.embeddings_norm = run_hook(self, "create_embeddings_norm")
        name_layer(self.embeddings_norm, "embeddings_norm")

    def _connect(self) -> tuple[Any, Any]:
        inputs = token_inputs()
        if (self.num_token_types or 0) > 1:
            inputs[TYPES] = keras.Input((None,), dtype="int32", name=TYPES)
        x = self.embed(**inputs)
        return inputs, self.layer_norm(self.transform(x, inputs["padding_mask"]))

    def embed(  # type: ignore[override]
        self, token_ids: Tensor, padding_mask: Tensor, token_type_ids: Tensor = None
    ) -> Tensor:
        """Returns the embeddings of tokens, of their types and positions, normalized."""
        x = self.token_embedding(token_ids)
        if self.token_type_embedding is not None:
            if token_type_ids is None:
                token_type_ids = ops.zeros_like(token_ids)
            types = self.token_type_embedding(token_type_ids)
            x = keras.layers.Add(name="token_types_add")((x, types))
        x = self.embeddings_norm(self.add_positions(x, padding_mask))
        return self.embeddings_dropout(x)

    def create_encoder(self, layer_index: int) -> keras.layers.Layer:
        """Hook: makes a block; by default of the class `encoder_class`.

        Args:
            layer_index: int. The depth, from 0.

        Returns:
            A `blocks.CustomEncoder`, or another layer that is called with `x` and
            `padding_mask`. One of `self.transformer_layers`, where the blocks made so far
            are, is used again at this depth.
        """
        run = functools.partial(_run_hook, self, layer_index)
        return self._make_block("encoder", CustomEncoder, run)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return GroupedQueryAttention(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_heads,
            dropout=self.dropout,
            causal=False,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return FeedForward(
            self.intermediate_dim,
            activation=published_activation(self.activation),
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def create_embeddings_norm(self) -> keras.layers.Layer:
        """Hook: makes the normalization of the embeddings.

        By default it is one that `create_norm` makes for `layer_index=0`. A model without
        returns `keras.layers.Identity()`.
        """
        shape = (None, None, self.token_embedding.output_dim)
        return run_hook(self, "create_norm", shape, 0)

    def create_head_transform(self, task: str) -> keras.layers.Layer | None:
        """Hook: makes the layer between hidden states and the outputs of a task.

        Args:
            task: str. `"masked_lm"`, `"text_classifier"` or `"token_classifier"`.

        Returns:
            A layer, or `None`. That of `"masked_lm"` returns vectors of the width of the
            token embedding.
        """
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        if task == "token_classifier":
            return None
        if task == "text_classifier":
            return keras.layers.Dense(
                self.hidden_dim, "tanh", kernel_initializer=initializer
            )
        width = self.token_embedding.output_dim
        dense = keras.layers.Dense(
            width,
            published_activation(self.activation),
            kernel_initializer=initializer,
            name="dense",
        )
        norm = run_hook(self, "create_norm", (None, None, width), self.num_layers)
        name_layer(norm, "norm")
        return keras.Sequential([dense, norm])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["num_token_types"] = self.num_token_types
        config["normalize_first"] = self.normalize_first
        config["activation"] = self.activation
        return config
