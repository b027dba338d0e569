"""Qwen3-Next: gated delta networks and, in each fourth block, gated attention."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, GatedDeltaNet
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import (
    Dense,
    DenseByGroup,
    Depthwise,
    attention_paths,
    rows_by_group,
)
from blocks.layers.mixture_of_experts import MixtureOfExperts
from blocks.layers.norms import ZeroCenteredRMSNormalization
from blocks.models.gemma3_text import Gemma3Attention
from blocks.models.qwen3_moe import Qwen3Moe, Qwen3MoeBackbone, shared_expert

KINDS = ("linear_attention", "full_attention")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Qwen3NextBackbone(Qwen3MoeBackbone):
    """Qwen3-Next.

    Args:
        *args: those of `Qwen3MoeBackbone`, also by keyword; `layer_types` has
            `"linear_attention"` for each block with a gated delta network.
        shared_expert_dim: int. The width inside the expert that all tokens see.
        linear_heads: int. How many value heads such a network has.
        linear_key_heads: int. How many query and key heads it has.
        linear_key_dim: int. The size of these.
        linear_value_dim: int. The size of value heads.
        linear_kernel_size: int. How many tokens its convolution sees.

    Reference:

    - [Yang et al., 2024](https://arxiv.org/abs/2412.06464)
    """

    def __init__(
        self,
        *args: Any,
        linear_heads: int = 32,
        linear_key_heads: int = 16,
        linear_key_dim: int = 128,
        linear_value_dim: int = 128,
        linear_kernel_size: int = 4,
        shared_expert_dim: int = 512,
        **kwargs: Any,
    ) -> None:
        self.linear_heads, self.linear_key_heads = linear_heads, linear_key_heads
        self.linear_key_dim, self.linear_value_dim = linear_key_dim, linear_value_dim
        self.linear_kernel_size = linear_kernel_size
        self.shared_expert_dim = shared_expert_dim
        super().__init__(*args, **kwargs)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        if self.layer_types and self.layer_types[layer_index] == KINDS[0]:
            return GatedDeltaNet(
                self.linear_heads,
                self.linear_key_heads,
                self.linear_key_dim,
                self.linear_value_dim,
                self.linear_kernel_size,
                self.layer_norm_epsilon,
            )
        return Gemma3Attention(**self.attention_options(layer_index), output_gate=True)

    def is_sliding(self, layer_index: int) -> bool:
        return False

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        if layer_index in self.dense_layers:
            return super().create_ffn(inputs_shape, layer_index)
        return MixtureOfExperts(
            self.num_experts,
            self.expert_dim,
            self.num_experts_per_token,
            normalize_weights=self.normalize_weights,
            shared_intermediate_dim=self.shared_expert_dim,
            shared_gate=True,
        )

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return ZeroCenteredRMSNormalization(self.layer_norm_epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(Qwen3NextBackbone, self)}


# One tensor has both.
QUERY = ("query", "output_gate")


@register_architecture
class Qwen3Next(Qwen3Moe):
    """The table of Qwen3-Next."""

    model_type = "qwen3_next"
    transformers_class = "Qwen3NextForCausalLM"
    backbone_class = Qwen3NextBackbone
    config = {
        **{k: v for k, v in Qwen3Moe.config.items() if k != "window"},
        "num_key_value_heads": ("num_key_value_heads", 2),
        "key_dim": ("head_dim", 256),
        "rotary_factor": ("partial_rotary_factor", 0.25),
        "num_experts": ("num_experts", 512),
        "num_experts_per_token": ("num_experts_per_tok", 10),
        "expert_dim": ("moe_intermediate_size", 512),
        "shared_expert_dim": ("shared_expert_intermediate_size", 512),
        "normalize_weights": ("norm_topk_prob", True),
        "layer_types": ("layer_types", None),
        "linear_heads": ("linear_num_value_heads", 32),
        "linear_key_heads": ("linear_num_key_heads", 16),
        "linear_key_dim": ("linear_key_head_dim", 128),
        "linear_value_dim": ("linear_value_head_dim", 128),
        "linear_kernel_size": ("linear_conv_kernel_dim", 4),
    }
    layer_weights = {
        **Qwen3Moe.layer_weights,
        "self_attn.q_proj.weight": DenseByGroup(*attention_paths("kernel", *QUERY)),
        "self_attn.q_proj.bias": DenseByGroup(*attention_paths("bias", *QUERY)),
        "linear_attn.conv1d.weight": Depthwise("self_attention/convolution/kernel"),
        "linear_attn.A_log": "self_attention/log_rate",
        "linear_attn.dt_bias": "self_attention/decay_bias",
        "linear_attn.norm.weight": "self_attention/head_norm/scale",
        "linear_attn.out_proj.weight": "self_attention/output/kernel",
        "mlp.shared_expert_gate.weight": "ffn/shared_gate/kernel",
        **shared_expert("shared_expert"),
    }

    def layer_table(self, backbone: Any) -> dict[str, Any]:
        groups, key_dim = backbone.linear_key_heads, backbone.linear_key_dim
        times = backbone.linear_heads // groups
        values = times * backbone.linear_value_dim
        inputs = Dense(*attention_paths("kernel", "query_key_value", "gate"))
        rates = Dense(*attention_paths("kernel", "beta", "decay"))
        sizes = [key_dim, key_dim, values, values]
        return {
            **self.layer_weights,
            "linear_attn.in_proj_qkvz.weight": rows_by_group(inputs, groups, sizes),
            "linear_attn.in_proj_ba.weight": rows_by_group(rates, groups, [times] * 2),
        }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        read = super().read_config(config)
        every, blocks = config.get("full_attention_interval", 4), read["num_layers"]
        kinds = [KINDS[i % every == 0] for i in range(1, blocks + 1)]
        return {**read, "layer_types": read["layer_types"] or kinds}

    def is_ignored(self, name: str, backbone: Any) -> bool:
        # Layers that predict further tokens, which nothing here uses.
        return name.startswith("mtp.") or super().is_ignored(name, backbone)
