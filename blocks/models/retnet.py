"""RetNet, as the flash-linear-attention library stores it."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, Retention
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.custom_backbone import CustomBackbone
from blocks.layers.feed_forward import GatedFeedForward


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RetNetBackbone(CustomBackbone):
    """RetNet: retention, gated feed-forward layers, RMS norms.

    Args:
        *args: those of `blocks.CustomBackbone`, also by keyword.
        key_dim: int or `None`. See `attention.Retention`, and so is `value_dim`.

    Reference:

    - [Sun et al., 2023](https://arxiv.org/abs/2307.08621)
    """

    def __init__(
        self,
        *args: Any,
        key_dim: int | None = None,
        value_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.key_dim, self.value_dim = key_dim, value_dim
        kwargs["learned_positions"] = False
        super().__init__(*args, **kwargs)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        sizes = (self.key_dim, self.value_dim)
        return Retention(self.num_heads, *sizes, epsilon=self.layer_norm_epsilon)

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return GatedFeedForward(self.intermediate_dim)

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.RMSNormalization(epsilon=self.layer_norm_epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(RetNetBackbone, self)}


@register_architecture
class RetNet(Architecture):
    """The table of RetNet, which transformers does not have."""

    model_type = "retnet"
    backbone_class = RetNetBackbone
    config = {
        "vocabulary_size": ("vocab_size", 32000),
        "num_layers": ("num_hidden_layers", 24),
        "num_heads": ("num_heads", 8),
        "hidden_dim": ("hidden_size", 2048),
        "intermediate_dim": ("intermediate_size", None),
        "layer_norm_epsilon": ("norm_eps", 1e-6),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    }
    constants = {
        "hidden_act": ("swish", "silu"),
        "num_kv_heads": None,
        "feature_map": None,
        "use_short_conv": False,
        "use_output_gate": True,
        "elementwise_affine": True,
        # Without it, the norm of heads has another name.
        "fuse_norm": True,
        "attn": None,
        "attnres_block_size": None,
    }
    base_prefix = "model."
    weights = {
        "model.embeddings.weight": "token_embedding/embeddings",
        "model.norm.weight": "layer_norm/scale",
        "lm_head.weight": "token_embedding/reverse_embeddings",
    }
    layer_prefix = "model.layers.{i}."
    layer_weights = {
        "attn_norm.weight": "attention_norm/scale",
        "attn.q_proj.weight": "self_attention/query/kernel",
        "attn.k_proj.weight": "self_attention/key/kernel",
        "attn.v_proj.weight": "self_attention/value/kernel",
        "attn.g_proj.weight": "self_attention/gate/kernel",
        "attn.g_norm_swish_gate.weight": "self_attention/head_norm/scale",
        "attn.o_proj.weight": "self_attention/output/kernel",
        "mlp_norm.weight": "ffn_norm/scale",
        "mlp.gate_proj.weight": "ffn/gate/kernel",
        "mlp.up_proj.weight": "ffn/intermediate/kernel",
        "mlp.down_proj.weight": "ffn/output/kernel",
    }
    ignored = (".rotary.inv_freq",)

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        found = super().read_config(config)
        width, heads = found["hidden_dim"], found["num_heads"]
        found["key_dim"] = round(width * config.get("expand_k", 1)) // heads
        found["value_dim"] = round(width * config.get("expand_v", 2)) // heads
        inner = int(width * (config.get("hidden_ratio", 2) or 4) * 2 / 3)
        found["intermediate_dim"] = found["intermediate_dim"] or -(-inner // 256) * 256
        return found
