"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import arguments_of, describe
from blocks.checkpoints.architecture import register_architecture
from blocks.models.llama import Llama, LlamaBackbone

LAYER_TYPES = ("full_attention", "sliding_attention")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MistralBackbone(LlamaBackbone):
    """Mistral: Llama whose attention sees a sliding window, in all blocks or in some.

    Args:
        *args: those of `LlamaBackbone`, also by keyword.
        window: int or `None`. How many positions a token sees, itself included;
            `None` means all.
        layer_types: list of str or `None`. `"sliding_attention"` for each block that has
            the window, `"full_attention"` for each other; `None`: all have it.

    Raises:
        ValueError: if `layer_types` has another length or other names.

    Reference:

    - [Jiang et al., 2023](https://arxiv.org/abs/2310.06825)
    """

    def __init__(
        self,
        *args: Any,
        window: int | None = None,
        layer_types: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.window = window
        self.layer_types = layer_types
        super().__init__(*args, **kwargs)

    def is_sliding(self, layer_index: int) -> bool:
        """Returns whether the block at a depth is one of those that have the window."""
        kinds = self.layer_types or LAYER_TYPES[1:] * self.num_layers
        if len(kinds) != self.num_layers or not set(kinds) <= set(LAYER_TYPES):
            raise ValueError(
                f"`layer_types` must be {self.num_layers} names, one of {LAYER_TYPES} "
                f"for each block. Received: layer_types={describe(kinds)}"
            )
        return kinds[layer_index] == LAYER_TYPES[1]

    def attention_options(self, layer_index: int) -> dict[str, Any]:
        window = self.window if self.is_sliding(layer_index) else None
        return {**super().attention_options(layer_index), "window": window}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(MistralBackbone, self)}


def without_unused_window(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments of a `MistralBackbone` without a window that no block has."""
    unused = LAYER_TYPES[1] not in arguments["layer_types"]
    return {**arguments, "window": None} if unused else arguments


def write_window(backbone: Any) -> dict[str, Any]:
    """Returns a configuration's keys of windows, for models that can't be without one."""
    window = backbone.window or backbone.max_sequence_length
    return {"layer_types": write_layer_types(backbone), "sliding_window": window}


def write_layer_types(backbone: Any) -> list[str]:
    """Returns the `layer_types` of a `MistralBackbone` for its configuration."""
    windows = backbone.window is not None
    numbers = range(backbone.num_layers)
    return [LAYER_TYPES[windows and backbone.is_sliding(i)] for i in numbers]


@register_architecture
class Mistral(Llama):
    """The table of Mistral."""

    model_type = "mistral"
    transformers_class = "MistralForCausalLM"
    backbone_class = MistralBackbone
    config = {
        **{k: v for k, v in Llama.config.items() if not k.endswith("_bias")},
        "num_key_value_heads": ("num_key_value_heads", 8),
        "max_sequence_length": ("max_position_embeddings", 4096 * 32),
        "window": ("sliding_window", 4096),
    }
