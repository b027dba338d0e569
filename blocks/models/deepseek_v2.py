"""DeepSeek-V2: latent attention, and experts of which one sees all tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from attention import CachedLayer, LatentAttention, RotaryPosition
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import (
    Conversion,
    Dense,
    attention_paths,
    rows_in_pairs,
)
from blocks.layers.group_limited_experts import GroupLimitedExperts
from blocks.models.llama import Llama, LlamaBackbone
from blocks.models.qwen3_moe import EXPERTS, shared_expert


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class DeepseekV2Backbone(LlamaBackbone):
    """DeepSeek-V2: Llama with latent attention and, after the first blocks, experts.

    Args:
        *args: those of `LlamaBackbone`, also by keyword; `key_dim` is that of the part
            of a head that is not rotated.
        value_dim: int. See `attention.LatentAttention`; so are `latent_dim`,
            `rotary_dim` and `query_latent_dim`.
        num_dense_layers: int. How many blocks, the first ones, have no experts.
        num_experts: int. The number of experts.
        num_experts_per_token: int. How many of them see a token.
        expert_dim: int. The width inside an expert.
        shared_expert_dim: int or `None`. That inside the expert that sees all tokens.
        expert_groups: pair of ints. See `GroupLimitedExperts`.
        expert_scale: float. The factor of the weights of experts.

    Reference:

    - [DeepSeek-V2, 2024](https://arxiv.org/abs/2405.04434)
    """

    def __init__(
        self,
        *args: Any,
        value_dim: int = 128,
        latent_dim: int = 512,
        rotary_dim: int = 64,
        num_experts: int = 64,
        num_experts_per_token: int = 6,
        expert_dim: int = 1408,
        query_latent_dim: int | None = None,
        num_dense_layers: int = 0,
        shared_expert_dim: int | None = None,
        expert_groups: Sequence[int] = (1, 1),
        expert_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.value_dim, self.latent_dim = value_dim, latent_dim
        self.rotary_dim, self.query_latent_dim = rotary_dim, query_latent_dim
        self.num_dense_layers, self.num_experts = num_dense_layers, num_experts
        self.num_experts_per_token, self.expert_dim = num_experts_per_token, expert_dim
        self.shared_expert_dim = shared_expert_dim
        self.expert_groups, self.expert_scale = list(expert_groups), expert_scale
        super().__init__(*args, **kwargs)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        scaling = self.rope_scaling or {}
        sharper = 0.1 * (scaling.get("mscale_all_dim") or 0.0)
        stretch = 1 + sharper * math.log(max(scaling.get("factor", 1.0), 1.0))
        key_dim: Any = self.key_dim
        return LatentAttention(
            self.num_heads,
            key_dim,
            self.value_dim,
            self.latent_dim,
            self.rotary_dim,
            self.query_latent_dim,
            RotaryPosition(self.rope_theta, self.rope_scaling, name="position"),
            scale=stretch**2 / math.sqrt(key_dim + self.rotary_dim),
            dropout=self.dropout,
        )

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        if layer_index < self.num_dense_layers:
            return super().create_ffn(inputs_shape, layer_index)
        return GroupLimitedExperts(
            self.num_experts,
            self.expert_dim,
            self.num_experts_per_token,
            normalize_weights=False,
            shared_intermediate_dim=self.shared_expert_dim,
            groups=self.expert_groups,
            scale=self.expert_scale,
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(DeepseekV2Backbone, self)}


class KeyValueUp(Conversion):
    """A matrix of the keys' and values' rows of each head, and a weight for each."""

    def tensor_shapes(self, shapes: Any, count: int) -> list[tuple[int, ...]]:
        (heads, key_dim, latent_dim), (*_, value_dim) = shapes
        return [(heads * (key_dim + value_dim), latent_dim)]

    def load(self, tensors: Any, shapes: Any) -> list[np.ndarray]:
        heads, key_dim, latent_dim = shapes[0]
        rows = next(tensors).reshape((heads, -1, latent_dim))
        return [rows[:, :key_dim], rows[:, key_dim:].swapaxes(1, 2)]

    def save(self, weights: Any, count: int) -> list[np.ndarray]:
        key, value = weights
        rows = np.concatenate([key, value.swapaxes(1, 2)], axis=1)
        return [rows.reshape((-1, key.shape[-1]))]


@register_architecture
class DeepseekV2(Llama):
    """The table of DeepSeek-V2."""

    model_type = "deepseek_v2"
    transformers_class = "DeepseekV2ForCausalLM"
    backbone_class = DeepseekV2Backbone
    config = {
        **{k: v for k, v in Llama.config.items() if not k.endswith("_bias")},
        "key_dim": ("qk_nope_head_dim", 128),
        "value_dim": ("v_head_dim", 128),
        "latent_dim": ("kv_lora_rank", 512),
        "rotary_dim": ("qk_rope_head_dim", 64),
        "query_latent_dim": ("q_lora_rank", 1536),
        "num_dense_layers": ("first_k_dense_replace", 0),
        "num_experts": ("n_routed_experts", 64),
        "num_experts_per_token": ("num_experts_per_tok", None),
        "expert_dim": ("moe_intermediate_size", 1407),
        "expert_scale": ("routed_scaling_factor", 1.0),
    }
    constants = {
        **Llama.constants,
        **dict.fromkeys(("attention_bias", "mlp_bias", "norm_topk_prob"), False),
        "topk_method": ("group_limited_greedy", "greedy"),  # of one group, the same
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
    }
    layer_weights = {
        **Llama.layer_weights,
        **EXPERTS,
        "self_attn.q_a_proj.weight": "self_attention/query_down/kernel",
        "self_attn.q_a_layernorm.weight": "self_attention/query_norm/scale",
        "self_attn.kv_a_layernorm.weight": "self_attention/latent_norm/scale",
        "self_attn.kv_b_proj.weight": KeyValueUp(
            "self_attention/key_up", "self_attention/value_up"
        ),
        **shared_expert("shared_experts"),
    }

    def layer_table(self, backbone: Any) -> dict[str, Any]:
        table, rotary = dict(self.layer_weights), backbone.rotary_dim
        sizes = (backbone.key_dim, rotary)
        query = rows_in_pairs(table.pop("self_attn.q_proj.weight"), *sizes)
        name = "q_proj" if backbone.query_latent_dim is None else "q_b_proj"
        latent: Any = Dense(*attention_paths("kernel", "latent", "rotary_key"))
        latent = rows_in_pairs(latent, backbone.latent_dim, rotary)
        table[f"self_attn.{name}.weight"] = query
        return {**table, "self_attn.kv_a_proj_with_mqa.weight": latent}

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        read = super().read_config(config)
        shared = (config.get("n_shared_experts", 2) or 0) * read["expert_dim"] or None
        limited = config.get("topk_method") == "group_limited_greedy"
        groups = [config["n_group"], config["topk_group"]] if limited else [1, 1]
        return {**read, "expert_groups": groups, "shared_expert_dim": shared}

    def write_config(self, backbone: Any) -> dict[str, Any]:
        written = super().write_config(backbone)
        written["n_group"], written["topk_group"] = backbone.expert_groups
        shared = (backbone.shared_expert_dim or 0) // backbone.expert_dim
        return {**written, "n_shared_experts": shared, "head_dim": backbone.rotary_dim}
