"""Whisper, of speech."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention import (
    CachedLayer,
    CrossAttention,
    MultiHeadAttention,
    PositionEmbedding,
)
from attention.contract import Shape, Tensor, arguments_of, declare_axes
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import Convolution, layer_lines
from blocks.custom_seq2seq_backbone import CustomSeq2SeqBackbone
from blocks.models.bart import Bart, BartBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class WhisperBackbone(BartBackbone):
    """Whisper: spectrograms as sources, norms before the layers, keys without biases.

    Its source is `encoder_features`, of shape `(batch, frames, mel_bins)`: log-mel
    spectrograms, padded with silence, of which no frame is hidden.

    Args:
        *args: those of `BartBackbone`, also by keyword.
        mel_bins: int. The number of features of a frame.

    Reference:

    - [Radford et al., 2022](https://arxiv.org/abs/2212.04356)
    """

    normalize_first, normalize_embedding = True, False

    def __init__(self, *args: Any, mel_bins: int = 80, **kwargs: Any) -> None:
        self.mel_bins = mel_bins
        super().__init__(*args, **kwargs)

    def source_inputs(self) -> dict[str, Any]:
        name = "encoder_features"
        return {name: keras.Input((None, self.mel_bins), name=name)}

    def embed_source(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = inputs["encoder_features"]
        for i, strides in ((1, 1), (2, 2)):
            x = keras.layers.ZeroPadding1D(1, name=f"encoder_padding_{i}")(x)
            conv: Any = keras.layers.Conv1D(
                self.hidden_dim, 3, strides, activation="gelu", name=f"encoder_conv_{i}"
            )
            x = declare_axes(conv, {"kernel": (None, None, None)})(x)
        mask = ops.ones_like(x[..., 0], dtype="bool")
        return self.embeddings_dropout(self.add_positions(x, mask, "encoder_")), mask

    def create_embedding(self) -> keras.layers.Layer:
        return CustomSeq2SeqBackbone.create_embedding(self)

    def create_encoder_position_embedding(self) -> CachedLayer:
        # Sines and cosines, which files have.
        length = self.max_source_length or self.max_sequence_length
        return PositionEmbedding(length, sequence="source", trainable=False)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int, causal: bool = True
    ) -> CachedLayer:
        return MultiHeadAttention(
            self.num_heads, causal=causal, key_bias=False, dropout=self.dropout
        )

    def create_cross_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return CrossAttention(self.num_heads, key_bias=False, dropout=self.dropout)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(WhisperBackbone, self)}


@register_architecture
class Whisper(Bart):
    """The table of Whisper."""

    model_type = "whisper"
    causal_lm_class = "WhisperForConditionalGeneration"
    backbone_class = WhisperBackbone
    config = {
        "vocabulary_size": ("vocab_size", 51865),
        "num_layers": ("decoder_layers", 4),
        "num_encoder_layers": ("encoder_layers", 4),
        "num_heads": ("decoder_attention_heads", 6),
        "hidden_dim": ("d_model", 384),
        "intermediate_dim": ("decoder_ffn_dim", 1536),
        "max_sequence_length": ("max_target_positions", 448),
        "max_source_length": ("max_source_positions", 1500),
        "mel_bins": ("num_mel_bins", 80),
        "activation": ("activation_function", "gelu"),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    constants = {"is_encoder_decoder": True, "scale_embedding": False}
    weights = {
        "model.decoder.embed_tokens.weight": "token_embedding/embeddings",
        "model.encoder.conv1.weight": Convolution("encoder_conv_1/kernel"),
        "model.encoder.conv1.bias": "encoder_conv_1/bias",
        "model.encoder.conv2.weight": Convolution("encoder_conv_2/kernel"),
        "model.encoder.conv2.bias": "encoder_conv_2/bias",
        "model.encoder.embed_positions.weight": "encoder_position_embedding/embeddings",
        "model.decoder.embed_positions.weight": "position_embedding/embeddings",
        **layer_lines(
            {
                "model.encoder.layer_norm": "encoder_norm",
                "model.decoder.layer_norm": "layer_norm",
            }
        ),
        "proj_out.weight": "token_embedding/reverse_embeddings",
    }
    copies = {"model.decoder.embed_tokens.weight": ("proj_out.weight",)}

    def write_config(self, backbone: Any) -> dict[str, Any]:
        # By default it is beyond smaller vocabularies.
        return {**super().write_config(backbone), "pad_token_id": None}
