"""T5, and models of its architecture: T5 1.1, Flan-T5."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, CrossAttention, T5Attention
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import attention_lines, layer_lines
from blocks.custom_seq2seq_backbone import CustomSeq2SeqBackbone
from blocks.layers.feed_forward import (
    FeedForward,
    GatedFeedForward,
    published_activation,
)
from blocks.layers.logits_embedding import LogitsEmbedding


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class T5Backbone(CustomSeq2SeqBackbone):
    """T5: a table of relative positions for each side, RMS norms, no biases.

    Where embeddings are used for the logits, too, hidden states are scaled before.

    Args:
        *args: those of `blocks.CustomSeq2SeqBackbone`, also by keyword.
        key_dim: int. The size of a head.
        num_buckets: int. See `attention.T5Attention`, and so is `max_distance`.
        activation: str. See `blocks.layers.feed_forward.published_activation`; a gate
            has it where `gated-` stands before it.

    References:

    - [Raffel et al., 2019](https://arxiv.org/abs/1910.10683)
    - [Chung et al., 2022](https://arxiv.org/abs/2210.11416)
    """

    def __init__(
        self,
        *args: Any,
        key_dim: int = 64,
        num_buckets: int = 32,
        max_distance: int = 128,
        activation: str = "relu",
        **kwargs: Any,
    ) -> None:
        self.key_dim, self.activation = key_dim, activation
        self.num_buckets, self.max_distance = num_buckets, max_distance
        kwargs["learned_positions"] = False
        super().__init__(*args, **kwargs)

    def create_embedding(self) -> keras.layers.Layer:
        return LogitsEmbedding(
            self.vocabulary_size,
            self.hidden_dim,
            tie_weights=self.tie_word_embeddings,
            logit_scale=self.hidden_dim**-0.5 if self.tie_word_embeddings else 1.0,
        )

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int, causal: bool = True
    ) -> CachedLayer:
        first: Any = (self.transformer_layers if causal else self.encoder_layers)[0]
        return T5Attention(
            self.num_heads,
            self.key_dim,
            self.num_buckets,
            self.max_distance,
            causal=causal,
            dropout=self.dropout,
            position=first.self_attention.position if layer_index else None,
        )

    def create_cross_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return CrossAttention(
            self.num_heads,
            key_dim=self.key_dim,
            use_bias=False,
            scale=1.0,
            dropout=self.dropout,
        )

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        name = self.activation.removeprefix("gated-")
        layer = FeedForward if name == self.activation else GatedFeedForward
        # A gate's is the approximation, though its name doesn't say so.
        name = "gelu_new" if self.activation == "gated-gelu" else name
        return layer(self.intermediate_dim, published_activation(name), use_bias=False)

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.RMSNormalization(epsilon=self.layer_norm_epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(T5Backbone, self)}


def _ffn_lines(name: str, backbone: T5Backbone) -> dict[str, str]:
    """Returns the lines of a table for a feed-forward layer."""
    parts = {"wi": "intermediate", "wo": "output"}
    if backbone.activation.startswith("gated-"):
        parts = {"wi_0": "gate", "wi_1": "intermediate", "wo": "output"}
    return layer_lines({f"{name}.{x}": f"ffn/{y}" for x, y in parts.items()})


@register_architecture
class T5(Architecture):
    """The table of T5."""

    model_type = "t5"
    transformers_class = "T5ForConditionalGeneration"
    backbone_class = T5Backbone
    config = {
        "vocabulary_size": ("vocab_size", 32128),
        "num_layers": ("num_decoder_layers", None),
        "num_encoder_layers": ("num_layers", 6),
        "num_heads": ("num_heads", 8),
        "hidden_dim": ("d_model", 512),
        "intermediate_dim": ("d_ff", 2048),
        "key_dim": ("d_kv", 64),
        "num_buckets": ("relative_attention_num_buckets", 32),
        "max_distance": ("relative_attention_max_distance", 128),
        "layer_norm_epsilon": ("layer_norm_epsilon", 1e-6),
        "activation": ("feed_forward_proj", "relu"),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    # In files of transformers 5, whose `tie_word_embeddings` is always true.
    aliases = {"scale_decoder_outputs": "tie_word_embeddings"}
    constants = {"is_encoder_decoder": True}
    weights = {
        "shared.weight": "token_embedding/embeddings",
        "encoder.final_layer_norm.weight": "encoder_norm/scale",
        "decoder.final_layer_norm.weight": "layer_norm/scale",
        "lm_head.weight": "token_embedding/reverse_embeddings",
    }
    copies = {
        "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        "lm_head.weight": ("shared.weight",),
    }
    encoder_layer_prefix = "encoder.block.{i}."
    encoder_layer_weights = {
        **attention_lines("layer.0.SelfAttention", "self_attention", "qkvo"),
        # Of the first block: the others share it.
        "layer.0.SelfAttention.relative_attention_bias.weight": (
            "self_attention/relative_position_bias/embeddings"
        ),
        "layer.0.layer_norm.weight": "attention_norm/scale",
        "layer.1.layer_norm.weight": "ffn_norm/scale",
    }
    layer_prefix = "decoder.block.{i}."
    layer_weights = {
        **encoder_layer_weights,
        **attention_lines("layer.1.EncDecAttention", "cross_attention", "qkvo"),
        "layer.1.layer_norm.weight": "cross_attention_norm/scale",
        "layer.2.layer_norm.weight": "ffn_norm/scale",
    }
    # Some files have one, which nothing reads.
    ignored = (".EncDecAttention.relative_attention_bias.weight",)

    def encoder_layer_table(self, backbone: Any) -> dict[str, Any]:
        lines = _ffn_lines("layer.1.DenseReluDense", backbone)
        return {**self.encoder_layer_weights, **lines}

    def layer_table(self, backbone: Any) -> dict[str, Any]:
        return {**self.layer_weights, **_ffn_lines("layer.2.DenseReluDense", backbone)}

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        found = super().read_config(config)
        count = found["num_layers"] or found["num_encoder_layers"]
        return {**found, "num_layers": count}
