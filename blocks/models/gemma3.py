"""Gemma 3 with images, of which only the language model is read."""

from __future__ import annotations

from typing import Any

from blocks.checkpoints.architecture import register_architecture
from blocks.models.gemma3_text import Gemma3Text


@register_architecture
class Gemma3(Gemma3Text):
    """The table of Gemma 3 with images; what is exported is the language model."""

    model_type = "gemma3"
    constants = {**Gemma3Text.constants, "final_logit_softcapping": None}
    weights = {f"language_model.{k}": v for k, v in Gemma3Text.weights.items()}
    layer_prefix = f"language_model.{Gemma3Text.layer_prefix}"

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        tied = config.get("tie_word_embeddings", True)
        text = {"tie_word_embeddings": tied, **config.get("text_config", {})}
        return super().read_config(text)

    def is_ignored(self, name: str, backbone: Any) -> bool:
        of_images = name.startswith(("vision_tower.", "multi_modal_projector."))
        return of_images or super().is_ignored(name, backbone)
