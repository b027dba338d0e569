"""Qwen 2 and 2.5: Llama with biases, and a window in the last blocks."""

from __future__ import annotations

from typing import Any

import keras

from blocks.checkpoints.architecture import register_architecture
from blocks.models.mistral import (
    LAYER_TYPES,
    Mistral,
    MistralBackbone,
    write_layer_types,
)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Qwen2Backbone(MistralBackbone):
    """Qwen 2: projections of queries, keys and values have biases.

    Args:
        *args: those of `MistralBackbone`, also by keyword.

    Reference:

    - [Yang et al., 2024](https://arxiv.org/abs/2407.10671)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["attention_bias"] = True
        super().__init__(*args, **kwargs)

    def attention_options(self, layer_index: int) -> dict[str, Any]:
        return {**super().attention_options(layer_index), "output_bias": False}


@register_architecture
class Qwen2(Mistral):
    """The table of Qwen 2."""

    model_type = "qwen2"
    transformers_class = "Qwen2ForCausalLM"
    backbone_class = Qwen2Backbone
    config = {
        **Mistral.config,
        "num_key_value_heads": ("num_key_value_heads", 32),
        "max_sequence_length": ("max_position_embeddings", 32768),
        "layer_types": ("layer_types", None),
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        arguments = super().read_config(config)
        numbers = range(arguments["num_layers"])
        first = config.get("max_window_layers", 28)
        if not config.get("use_sliding_window", False):
            arguments["window"], first = None, len(numbers)
        if arguments["layer_types"] is None:
            arguments["layer_types"] = [LAYER_TYPES[i >= first] for i in numbers]
        return arguments

    def write_config(self, backbone: Any) -> dict[str, Any]:
        kinds = write_layer_types(backbone)
        written = {
            "use_sliding_window": backbone.window is not None,
            "layer_types": kinds,
            # Where the full ones come first, this says the same.
            "max_window_layers": kinds.count(LAYER_TYPES[0]),
        }
        return {**super().write_config(backbone), **written}
