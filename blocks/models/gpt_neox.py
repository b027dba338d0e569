"""GPT-NeoX, and models of its architecture: Pythia."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, RotaryAttention
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import DenseByGroup, attention_paths
from blocks.custom_backbone import CustomBackbone
from blocks.custom_decoder import CustomDecoder
from blocks.layers.feed_forward import FeedForward, published_activation
from blocks.parallel_decoder import OneNormDecoder, ParallelDecoder


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class GPTNeoXBackbone(CustomBackbone):
    """GPT-NeoX: parallel blocks, and rotary positions in a part of each head.

    Args:
        *args: those of `blocks.CustomBackbone`, also by keyword.
        parallel_norms: int. How many norms a block has whose attention and feed-forward
            layer read the same inputs, 1 or 2; 0: one reads the other's outputs.
        attention_bias: bool. Whether the attention's projections have biases.
        ffn_bias: bool. Whether those of the feed-forward layers have.
        activation: str. See `blocks.layers.feed_forward.published_activation`.
        rotary_fraction: float. How much of each head is rotated.
        rope_theta: number. The base of rotary positions.
        rope_scaling: dict or `None`. See `attention.RotaryPosition`.

    Reference:

    - [Black et al., 2022](https://arxiv.org/abs/2204.06745)
    """

    def __init__(
        self,
        *args: Any,
        parallel_norms: int = 2,
        attention_bias: bool = True,
        ffn_bias: bool = True,
        activation: str = "gelu",
        rotary_fraction: float = 0.25,
        rope_theta: float = 10_000.0,
        rope_scaling: dict | None = None,
        **kwargs: Any,
    ) -> None:
        self.parallel_norms = parallel_norms
        self.attention_bias = attention_bias
        self.ffn_bias = ffn_bias
        self.activation = activation
        self.rotary_fraction = rotary_fraction
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        decoders = (CustomDecoder, OneNormDecoder, ParallelDecoder)
        self.decoder_class = decoders[parallel_norms]
        kwargs["learned_positions"] = False
        super().__init__(*args, **kwargs)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return RotaryAttention(
            self.num_heads,
            self.num_key_value_heads,
            max_wavelength=self.rope_theta,
            scaling=self.rope_scaling,
            rotary_dim=int(self.hidden_dim // self.num_heads * self.rotary_fraction),
            use_bias=self.attention_bias,
            dropout=self.dropout,
        )

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        activation = published_activation(self.activation)
        return FeedForward(self.intermediate_dim, activation, self.ffn_bias)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(GPTNeoXBackbone, self)}


@register_architecture
class GPTNeoX(Architecture):
    """The table of GPT-NeoX."""

    model_type = "gpt_neox"
    transformers_class = "GPTNeoXForCausalLM"
    backbone_class = GPTNeoXBackbone
    config = {
        "vocabulary_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "hidden_dim": "hidden_size",
        "intermediate_dim": "intermediate_size",
        "max_sequence_length": ("max_position_embeddings", 2048),
        "layer_norm_epsilon": ("layer_norm_eps", 1e-5),
        "activation": ("hidden_act", "gelu"),
        "attention_bias": ("attention_bias", True),
        "rotary_fraction": ("partial_rotary_factor", 0.25),
        "rope_theta": ("rope_theta", 10_000.0),
        "rope_scaling": ("rope_scaling", None),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    }
    aliases = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    base_prefix = "gpt_neox."
    weights = {
        "gpt_neox.embed_in.weight": "token_embedding/embeddings",
        "gpt_neox.final_layer_norm.weight": "layer_norm/gamma",
        "gpt_neox.final_layer_norm.bias": "layer_norm/beta",
        "embed_out.weight": "token_embedding/reverse_embeddings",
    }
    layer_prefix = "gpt_neox.layers.{i}."
    layer_weights = {
        "input_layernorm.weight": "attention_norm/gamma",
        "input_layernorm.bias": "attention_norm/beta",
        "attention.query_key_value.weight": DenseByGroup(*attention_paths("kernel")),
        "attention.query_key_value.bias": DenseByGroup(*attention_paths("bias")),
        "attention.dense.weight": "self_attention/attention_output/kernel",
        "attention.dense.bias": "self_attention/attention_output/bias",
        "post_attention_layernorm.weight": "ffn_norm/gamma",
        "post_attention_layernorm.bias": "ffn_norm/beta",
        "mlp.dense_h_to_4h.weight": "ffn/intermediate/kernel",
        "mlp.dense_h_to_4h.bias": "ffn/intermediate/bias",
        "mlp.dense_4h_to_h.weight": "ffn/output/kernel",
        "mlp.dense_4h_to_h.bias": "ffn/output/bias",
    }
    ignored = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        arguments = super().read_config(config)
        parallel = config.get("use_parallel_residual", True)
        return {**arguments, "parallel_norms": 2 if parallel else 0}

    def write_config(self, backbone: Any) -> dict[str, Any]:
        parallel = backbone.parallel_norms > 0
        return {**super().write_config(backbone), "use_parallel_residual": parallel}
