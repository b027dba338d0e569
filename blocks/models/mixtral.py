"""Mixtral: Mistral with experts."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import Stacked
from blocks.layers.mixture_of_experts import MixtureOfExperts
from blocks.models.llama import Llama
from blocks.models.mistral import Mistral, MistralBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MixtralBackbone(MistralBackbone):
    """Mixtral: Mistral whose feed-forward layers are experts.

    Args:
        *args: those of `MistralBackbone`, also by keyword.
        num_experts: int. The number of experts of each block.
        num_experts_per_token: int. How many of them see a token.

    Reference:

    - [Jiang et al., 2024](https://arxiv.org/abs/2401.04088)
    """

    def __init__(
        self,
        *args: Any,
        num_experts: int = 8,
        num_experts_per_token: int = 2,
        **kwargs: Any,
    ) -> None:
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        super().__init__(*args, **kwargs)

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return MixtureOfExperts(
            self.num_experts, self.intermediate_dim, self.num_experts_per_token
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(MixtralBackbone, self)}


@register_architecture
class Mixtral(Mistral):
    """The table of Mixtral."""

    model_type = "mixtral"
    transformers_class = "MixtralForCausalLM"
    backbone_class = MixtralBackbone
    config = {
        **Mistral.config,
        "layer_norm_epsilon": ("rms_norm_eps", 1e-5),
        "window": ("sliding_window", None),
        "rope_theta": ("rope_theta", 1e6),
        "num_experts": ("num_local_experts", 8),
        "num_experts_per_token": ("num_experts_per_tok", 2),
    }
    layer_weights = {
        **Llama.layer_weights,
        "block_sparse_moe.gate.weight": "ffn/router/kernel",
        "block_sparse_moe.experts.{e}.w1.weight": Stacked("ffn/gate_kernels"),
        "block_sparse_moe.experts.{e}.w3.weight": Stacked("ffn/intermediate_kernels"),
        "block_sparse_moe.experts.{e}.w2.weight": Stacked("ffn/output_kernels"),
    }
