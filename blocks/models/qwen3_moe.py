"""Qwen 3 with experts, in all blocks or in some."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import Stacked
from blocks.layers.mixture_of_experts import MixtureOfExperts
from blocks.models.mistral import Mistral
from blocks.models.qwen3 import Qwen3, Qwen3Backbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Qwen3MoeBackbone(Qwen3Backbone):
    """Qwen 3 whose feed-forward layers are experts.

    Args:
        *args: those of `Qwen3Backbone`, also by keyword; `intermediate_dim` is the width
            inside feed-forward layers without experts.
        num_experts: int. The number of experts of each block.
        num_experts_per_token: int. How many of them see a token.
        expert_dim: int. The width inside an expert.
        normalize_weights: bool. Whether the weights of a token's experts sum to 1.
        dense_layers: list of ints. The blocks without experts.

    Reference:

    - [Yang et al., 2025](https://arxiv.org/abs/2505.09388)
    """

    def __init__(
        self,
        *args: Any,
        num_experts: int = 128,
        num_experts_per_token: int = 8,
        expert_dim: int = 768,
        normalize_weights: bool = False,
        dense_layers: list[int] | tuple[int, ...] = (),
        **kwargs: Any,
    ) -> None:
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.expert_dim = expert_dim
        self.normalize_weights = normalize_weights
        self.dense_layers = list(dense_layers)
        super().__init__(*args, **kwargs)

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        if layer_index in self.dense_layers:
            return super().create_ffn(inputs_shape, layer_index)
        return MixtureOfExperts(
            self.num_experts,
            self.expert_dim,
            self.num_experts_per_token,
            normalize_weights=self.normalize_weights,
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(Qwen3MoeBackbone, self)}


# Kernels by their names in files.
GATED = {"gate": "gate", "up": "intermediate", "down": "output"}
EXPERTS = {
    "mlp.gate.weight": "ffn/router/kernel",
    **{
        f"mlp.experts.{{e}}.{name}_proj.weight": Stacked(f"ffn/{path}_kernels")
        for name, path in GATED.items()
    },
}


def shared_expert(name: str) -> dict[str, str]:
    """Returns a table of the expert that all tokens see, by its name in files."""
    return {
        f"mlp.{name}.{x}_proj.weight": f"ffn/shared/{y}/kernel"
        for x, y in GATED.items()
    }


@register_architecture
class Qwen3Moe(Mistral):
    """The table of Qwen 3 with experts."""

    model_type = "qwen3_moe"
    transformers_class = "Qwen3MoeForCausalLM"
    backbone_class = Qwen3MoeBackbone
    config = {
        **Mistral.config,
        "num_key_value_heads": ("num_key_value_heads", 4),
        "max_sequence_length": ("max_position_embeddings", 32768),
        "attention_bias": ("attention_bias", False),
        "num_experts": ("num_experts", 128),
        "num_experts_per_token": ("num_experts_per_tok", 8),
        "expert_dim": ("moe_intermediate_size", 768),
        "normalize_weights": ("norm_topk_prob", False),
        "dense_layers": ("mlp_only_layers", None),
    }
    aliases = {"num_local_experts": "num_experts"}
    layer_weights = {**Qwen3.layer_weights, **EXPERTS}

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        read = super().read_config(config)
        if not config.get("use_sliding_window", False):
            read["window"] = None
        step, dense = config.get("decoder_sparse_step", 1), read["dense_layers"] or ()
        numbers = range(read["num_layers"])
        read["dense_layers"] = [i for i in numbers if i in dense or (i + 1) % step]
        return read

    def write_config(self, backbone: Any) -> dict[str, Any]:
        windows = backbone.window is not None
        more = {"decoder_sparse_step": 1, "use_sliding_window": windows}
        return {**super().write_config(backbone), **more}
