"""BART."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import Shape, Tensor, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import (
    Plain,
    attention_lines,
    layer_lines,
)
from blocks.custom_seq2seq_backbone import CustomSeq2SeqBackbone
from blocks.layers.feed_forward import FeedForward, published_activation
from blocks.layers.logits_embedding import LogitsEmbedding
from blocks.models.opt import AfterTwo


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class BartBackbone(CustomSeq2SeqBackbone):
    """BART: norms after the layers and after the embeddings.

    Args:
        *args: those of `blocks.CustomSeq2SeqBackbone`, also by keyword.
        activation: str. See `blocks.layers.feed_forward.published_activation`.
        scale_embedding: bool. Whether embeddings are multiplied by the square root of
            their width.

    Attributes:
        normalize_embedding: bool. Whether one comes after the embeddings.

    Reference:

    - [Lewis et al., 2019](https://arxiv.org/abs/1910.13461)
    """

    normalize_first, normalize_embedding = False, True

    def __init__(
        self,
        *args: Any,
        activation: str = "gelu",
        scale_embedding: bool = False,
        **kwargs: Any,
    ) -> None:
        self.activation, self.scale_embedding = activation, scale_embedding
        super().__init__(*args, **kwargs)

    def create_embedding(self) -> keras.layers.Layer:
        return LogitsEmbedding(
            self.vocabulary_size,
            self.hidden_dim,
            tie_weights=self.tie_word_embeddings,
            logit_bias=True,
        )

    def add_positions(self, x: Tensor, padding_mask: Tensor, side: str = "") -> Tensor:
        if self.scale_embedding:
            # A layer: Keras takes a tensor times a number for a sparse one.
            scale = keras.layers.Rescaling(
                self.hidden_dim**0.5, name=f"{side}embeddings_scale"
            )
            x = scale(x)
        x = super().add_positions(x, padding_mask, side)
        if not self.normalize_embedding:
            return x
        norm = f"{side}embedding_norm"
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, name=norm
        )(x)

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        activation = published_activation(self.activation)
        return FeedForward(self.intermediate_dim, activation)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(BartBackbone, self)}


@register_architecture
class Bart(Architecture):
    """The table of BART."""

    model_type = "bart"
    transformers_class = "BartForConditionalGeneration"
    backbone_class = BartBackbone
    config = {
        "vocabulary_size": ("vocab_size", 50265),
        "num_layers": ("decoder_layers", 12),
        "num_encoder_layers": ("encoder_layers", 12),
        "num_heads": ("decoder_attention_heads", 16),
        "hidden_dim": ("d_model", 1024),
        "intermediate_dim": ("decoder_ffn_dim", 4096),
        "max_sequence_length": ("max_position_embeddings", 1024),
        "activation": ("activation_function", "gelu"),
        "scale_embedding": ("scale_embedding", False),
    }
    same = {
        "encoder_attention_heads": "decoder_attention_heads",
        "encoder_ffn_dim": "decoder_ffn_dim",
    }
    # Without tied embeddings, sources would have some of their own.
    constants = {"is_encoder_decoder": True, "tie_word_embeddings": True}
    base_prefix = "model."
    weights = {
        "model.shared.weight": "token_embedding/embeddings",
        "model.encoder.embed_positions.weight": AfterTwo(
            "encoder_position_embedding/embeddings"
        ),
        "model.decoder.embed_positions.weight": AfterTwo(
            "position_embedding/embeddings"
        ),
        **layer_lines(
            {
                "model.encoder.layernorm_embedding": "encoder_embedding_norm",
                "model.decoder.layernorm_embedding": "embedding_norm",
                # Where norms come first.
                "model.encoder.layer_norm": "encoder_norm",
                "model.decoder.layer_norm": "layer_norm",
            }
        ),
        "final_logits_bias": Plain("token_embedding/bias", rank=2),
    }
    copies = {
        "model.shared.weight": (
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        )
    }
    optional = ("final_logits_bias",)
    # Of an older library, which wrote them besides.
    ignored = (".version",)
    encoder_layer_prefix = "model.encoder.layers.{i}."
    encoder_layer_weights = {
        **attention_lines("self_attn", "self_attention"),
        **layer_lines(
            {
                "self_attn_layer_norm": "attention_norm",
                "fc1": "ffn/intermediate",
                "fc2": "ffn/output",
                "final_layer_norm": "ffn_norm",
            }
        ),
    }
    layer_prefix = "model.decoder.layers.{i}."
    layer_weights = {
        **encoder_layer_weights,
        **attention_lines("encoder_attn", "cross_attention"),
        **layer_lines({"encoder_attn_layer_norm": "cross_attention_norm"}),
    }
