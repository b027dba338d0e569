"""Moonshine, of speech."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, CrossAttention, RotaryAttention
from attention.contract import Shape, Tensor, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import (
    Convolution,
    Dense,
    attention_lines,
    layer_lines,
    rows_in_pairs,
)
from blocks.custom_encoder import CustomEncoder
from blocks.custom_seq2seq_backbone import CustomSeq2SeqBackbone
from blocks.layers.audio_stem import AudioStem
from blocks.layers.feed_forward import FeedForward, GatedFeedForward


class MoonshineEncoder(CustomEncoder):
    """A block whose feed-forward layer has no gate, which those of the decoder have."""

    def create_ffn(self, inputs_shape: Shape) -> keras.layers.Layer:
        return FeedForward(self.intermediate_dim, "gelu")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MoonshineBackbone(CustomSeq2SeqBackbone):
    """Moonshine: audio as sources, rotary positions on both sides.

    Its source is `encoder_audio`, of shape `(batch, samples)`, 16,000 a second, and
    `encoder_padding_mask` of the same shape.

    Args:
        *args: those of `blocks.CustomSeq2SeqBackbone`, also by keyword.
        rope_theta: number. The base of rotary positions.
        rope_scaling: dict or `None`. See `attention.RotaryPosition`.
        rotary_factor: float. The rotated part of each head.

    Reference:

    - [Jeffries et al., 2024](https://arxiv.org/abs/2410.15608)
    """

    encoder_class = MoonshineEncoder

    def __init__(
        self,
        *args: Any,
        rope_theta: float = 10_000.0,
        rope_scaling: dict | None = None,
        rotary_factor: float = 0.9,
        **kwargs: Any,
    ) -> None:
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.rotary_factor = rotary_factor
        kwargs["learned_positions"] = False
        super().__init__(*args, **kwargs)

    def source_inputs(self) -> dict[str, Any]:
        dtypes = {"encoder_audio": "float32", "encoder_padding_mask": "int32"}
        return {x: keras.Input((None,), dtype=y, name=x) for x, y in dtypes.items()}

    def embed_source(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        stem = AudioStem(self.hidden_dim, name="encoder_stem")
        return stem(inputs["encoder_audio"], inputs["encoder_padding_mask"])

    def rotary_dims(self) -> tuple[int, int]:
        """Returns how many dimensions of a head are rotated, and how many are not."""
        size = self.hidden_dim // self.num_heads
        rotated = int(size * self.rotary_factor)
        return rotated, size - rotated

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int, causal: bool = True
    ) -> CachedLayer:
        return RotaryAttention(
            self.num_heads,
            max_wavelength=self.rope_theta,
            scaling=self.rope_scaling,
            rotary_dim=self.rotary_dims()[0],
            causal=causal,
            use_bias=False,
            dropout=self.dropout,
        )

    def create_cross_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return CrossAttention(self.num_heads, use_bias=False, dropout=self.dropout)

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return GatedFeedForward(self.intermediate_dim, use_bias=True)

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, center=False
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(MoonshineBackbone, self)}


_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _in_pairs(table: dict[str, Any], backbone: MoonshineBackbone) -> dict[str, Any]:
    """Returns a block's table, whose heads are rotated in pairs of neighbours."""
    names = [f"self_attn.{x}.weight" for x in ("q_proj", "k_proj")]
    sizes = (0, *backbone.rotary_dims())
    return {**table, **{name: rows_in_pairs(table[name], *sizes) for name in names}}


@register_architecture
class Moonshine(Architecture):
    """The table of Moonshine."""

    model_type = "moonshine"
    transformers_class = "MoonshineForConditionalGeneration"
    backbone_class = MoonshineBackbone
    config = {
        "vocabulary_size": ("vocab_size", 32768),
        "num_layers": ("decoder_num_hidden_layers", 6),
        "num_encoder_layers": ("encoder_num_hidden_layers", 6),
        "num_heads": ("decoder_num_attention_heads", 8),
        "hidden_dim": ("hidden_size", 288),
        "intermediate_dim": ("intermediate_size", 1152),
        "max_sequence_length": ("max_position_embeddings", 512),
        "rope_theta": ("rope_theta", 10_000.0),
        "rope_scaling": ("rope_scaling", None),
        "rotary_factor": ("partial_rotary_factor", 0.9),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    same = dict.fromkeys(
        (
            "decoder_num_key_value_heads",
            "encoder_num_attention_heads",
            "encoder_num_key_value_heads",
        ),
        "decoder_num_attention_heads",
    )
    constants = {
        "is_encoder_decoder": True,
        "attention_bias": False,
        "encoder_hidden_act": "gelu",
        "decoder_hidden_act": ("silu", "swish"),
    }
    base_prefix = "model."
    weights = {
        "model.decoder.embed_tokens.weight": "token_embedding/embeddings",
        "model.encoder.conv1.weight": Convolution("encoder_stem/conv_1/kernel"),
        "model.encoder.groupnorm.weight": "encoder_stem/scale",
        "model.encoder.groupnorm.bias": "encoder_stem/bias",
        "model.encoder.conv2.weight": Convolution("encoder_stem/conv_2/kernel"),
        "model.encoder.conv2.bias": "encoder_stem/conv_2/bias",
        "model.encoder.conv3.weight": Convolution("encoder_stem/conv_3/kernel"),
        "model.encoder.conv3.bias": "encoder_stem/conv_3/bias",
        "model.encoder.layer_norm.weight": "encoder_norm/gamma",
        "model.decoder.norm.weight": "layer_norm/gamma",
        "proj_out.weight": "token_embedding/reverse_embeddings",
    }
    copies = {"model.decoder.embed_tokens.weight": ("proj_out.weight",)}
    encoder_layer_prefix = "model.encoder.layers.{i}."
    encoder_layer_weights = {
        "input_layernorm.weight": "attention_norm/gamma",
        **attention_lines("self_attn", "self_attention", _PARTS),
        "post_attention_layernorm.weight": "ffn_norm/gamma",
        **layer_lines({"mlp.fc1": "ffn/intermediate", "mlp.fc2": "ffn/output"}),
    }
    layer_prefix = "model.decoder.layers.{i}."
    layer_weights = {
        **encoder_layer_weights,
        "post_attention_layernorm.weight": "cross_attention_norm/gamma",
        **attention_lines("encoder_attn", "cross_attention", _PARTS),
        "final_layernorm.weight": "ffn_norm/gamma",
        "mlp.fc1.weight": Dense("ffn/intermediate/kernel", "ffn/gate/kernel"),
        "mlp.fc1.bias": Dense("ffn/intermediate/bias", "ffn/gate/bias"),
    }

    def encoder_layer_table(self, backbone: Any) -> dict[str, Any]:
        return _in_pairs(self.encoder_layer_weights, backbone)

    def layer_table(self, backbone: Any) -> dict[str, Any]:
        return _in_pairs(self.layer_weights, backbone)
