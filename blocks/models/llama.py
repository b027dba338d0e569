"""Llama 2 and 3, and models of their architecture: SmolLM2, TinyLlama."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, RotaryAttention
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.custom_backbone import CustomBackbone
from blocks.layers.feed_forward import GatedFeedForward


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class LlamaBackbone(CustomBackbone):
    """Llama: rotary grouped-query attention, gated feed-forward layers, RMS norms.

    Args:
        *args: those of `blocks.CustomBackbone`, also by keyword.
        key_dim: int or `None`. The size of a head; `None`: `hidden_dim / num_heads`.
        attention_bias: bool. Whether the attention's projections have biases.
        ffn_bias: bool. Whether those of the feed-forward layers have.
        rope_theta: number. The base of rotary positions.
        rope_scaling: dict or `None`. See `attention.RotaryPosition`.
        rotary_factor: float. The rotated part of each head.

    References:

    - [Touvron et al., 2023](https://arxiv.org/abs/2307.09288)
    - [Llama 3, 2024](https://arxiv.org/abs/2407.21783)
    """

    def __init__(
        self,
        *args: Any,
        key_dim: int | None = None,
        attention_bias: bool = False,
        ffn_bias: bool = False,
        rope_theta: float = 10_000.0,
        rope_scaling: dict | None = None,
        rotary_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.key_dim = key_dim
        self.attention_bias = attention_bias
        self.ffn_bias = ffn_bias
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.rotary_factor = rotary_factor
        kwargs["learned_positions"] = False
        super().__init__(*args, **kwargs)

    def attention_options(self, layer_index: int) -> dict[str, Any]:
        """Returns the attention's arguments at a depth, for subclasses to change."""
        size, rest = divmod(self.hidden_dim, self.num_heads)
        rotary_dim = int((self.key_dim or size) * self.rotary_factor)
        return {
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "key_dim": self.key_dim or (None if rest else size),
            "use_bias": self.attention_bias,
            "max_wavelength": self.rope_theta,
            "scaling": self.rope_scaling,
            "rotary_dim": None if self.rotary_factor == 1 else rotary_dim,
            "dropout": self.dropout,
        }

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return RotaryAttention(**self.attention_options(layer_index))

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return GatedFeedForward(self.intermediate_dim, use_bias=self.ffn_bias)

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.RMSNormalization(epsilon=self.layer_norm_epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(LlamaBackbone, self)}


@register_architecture
class Llama(Architecture):
    """The table of Llama."""

    model_type = "llama"
    transformers_class = "LlamaForCausalLM"
    backbone_class = LlamaBackbone
    config = {
        "vocabulary_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_key_value_heads": ("num_key_value_heads", None),
        "hidden_dim": "hidden_size",
        "intermediate_dim": "intermediate_size",
        "key_dim": ("head_dim", None),
        "max_sequence_length": ("max_position_embeddings", 2048),
        "layer_norm_epsilon": ("rms_norm_eps", 1e-6),
        "attention_bias": ("attention_bias", False),
        "ffn_bias": ("mlp_bias", False),
        "rope_theta": ("rope_theta", 10_000.0),
        "rope_scaling": ("rope_scaling", None),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    }
    constants = {"hidden_act": ("silu", "swish")}
    base_prefix = "model."
    weights = {
        "model.embed_tokens.weight": "token_embedding/embeddings",
        "model.norm.weight": "layer_norm/scale",
        "lm_head.weight": "token_embedding/reverse_embeddings",
    }
    layer_prefix = "model.layers.{i}."
    layer_weights = {
        "input_layernorm.weight": "attention_norm/scale",
        "self_attn.q_proj.weight": "self_attention/query/kernel",
        "self_attn.q_proj.bias": "self_attention/query/bias",
        "self_attn.k_proj.weight": "self_attention/key/kernel",
        "self_attn.k_proj.bias": "self_attention/key/bias",
        "self_attn.v_proj.weight": "self_attention/value/kernel",
        "self_attn.v_proj.bias": "self_attention/value/bias",
        "self_attn.o_proj.weight": "self_attention/attention_output/kernel",
        "self_attn.o_proj.bias": "self_attention/attention_output/bias",
        "post_attention_layernorm.weight": "ffn_norm/scale",
        "mlp.gate_proj.weight": "ffn/gate/kernel",
        "mlp.gate_proj.bias": "ffn/gate/bias",
        "mlp.up_proj.weight": "ffn/intermediate/kernel",
        "mlp.up_proj.bias": "ffn/intermediate/bias",
        "mlp.down_proj.weight": "ffn/output/kernel",
        "mlp.down_proj.bias": "ffn/output/bias",
    }

    def write_config(self, backbone: Any) -> dict[str, Any]:
        config, heads = super().write_config(backbone), backbone.num_heads
        # Not all configurations allow `None`.
        config["num_key_value_heads"] = backbone.num_key_value_heads or heads
        config["head_dim"] = backbone.key_dim or backbone.hidden_dim // heads
        return config
