"""Qwen 3: query and key heads are normalized."""

from __future__ import annotations

from typing import Any

import keras

from blocks.checkpoints.architecture import register_architecture
from blocks.models.llama import Llama
from blocks.models.mistral import MistralBackbone
from blocks.models.qwen2 import Qwen2


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Qwen3Backbone(MistralBackbone):
    """Qwen 3: Mistral whose query and key heads are normalized.

    Args:
        *args: those of `MistralBackbone`, also by keyword.

    Reference:

    - [Yang et al., 2025](https://arxiv.org/abs/2505.09388)
    """

    def attention_options(self, layer_index: int) -> dict[str, Any]:
        norm = {"query_key_norm": True, "norm_epsilon": self.layer_norm_epsilon}
        return {**super().attention_options(layer_index), **norm}


@register_architecture
class Qwen3(Qwen2):
    """The table of Qwen 3."""

    model_type = "qwen3"
    transformers_class = "Qwen3ForCausalLM"
    backbone_class = Qwen3Backbone
    config = {
        **Qwen2.config,
        "key_dim": ("head_dim", 128),
        "attention_bias": ("attention_bias", False),
    }
    layer_weights = {
        **Llama.layer_weights,
        "self_attn.q_norm.weight": "self_attention/query_norm/scale",
        "self_attn.k_norm.weight": "self_attention/key_norm/scale",
    }
