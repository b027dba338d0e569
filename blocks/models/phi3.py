"""Phi-3 and Phi-4: Mistral in other tensors."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import describe
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import Dense, attention_paths
from blocks.models.mistral import Mistral, MistralBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Phi3Backbone(MistralBackbone):
    """Phi-3: Mistral, of which a part of each head may be rotated.

    Args:
        *args: those of `MistralBackbone`, also by keyword.

    Reference:

    - [Abdin et al., 2024](https://arxiv.org/abs/2404.14219)
    """


@register_architecture
class Phi3(Mistral):
    """The table of Phi-3."""

    model_type = "phi3"
    transformers_class = "Phi3ForCausalLM"
    backbone_class = Phi3Backbone
    config = {
        **Mistral.config,
        "num_key_value_heads": ("num_key_value_heads", None),
        "max_sequence_length": ("max_position_embeddings", 4096),
        "layer_norm_epsilon": ("rms_norm_eps", 1e-5),
        "window": ("sliding_window", None),
        "rotary_factor": ("partial_rotary_factor", 1.0),
    }
    layer_weights = {
        "input_layernorm.weight": "attention_norm/scale",
        "self_attn.qkv_proj.weight": Dense(*attention_paths("kernel")),
        "self_attn.o_proj.weight": "self_attention/attention_output/kernel",
        "post_attention_layernorm.weight": "ffn_norm/scale",
        "mlp.gate_up_proj.weight": Dense("ffn/gate/kernel", "ffn/intermediate/kernel"),
        "mlp.down_proj.weight": "ffn/output/kernel",
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        arguments = super().read_config(config)
        if arguments["rope_scaling"] is not None:
            raise ValueError(
                "LongRoPE is not computed here: with a token beyond the original "
                "length, all tokens before it get other rotary positions. Use a "
                "checkpoint without it, such as Phi-4 or those of Phi-3 that end in 4k. "
                f"Received: {describe(arguments['rope_scaling'])}"
            )
        return arguments

    def write_config(self, backbone: Any) -> dict[str, Any]:
        # Left out, it would be a token that small vocabularies do not have.
        return {**super().write_config(backbone), "pad_token_id": None}
