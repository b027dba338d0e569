"""Marian, of which are the OPUS-MT models of translation."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, SinusoidalPositions
from blocks.checkpoints.architecture import register_architecture
from blocks.models.bart import Bart, BartBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MarianBackbone(BartBackbone):
    """Marian: BART with sines and cosines as positions, and no norm of embeddings.

    Args:
        *args: those of `BartBackbone`, also by keyword.

    Reference:

    - [Junczys-Dowmunt et al., 2018](https://arxiv.org/abs/1804.00344)
    """

    normalize_embedding = False

    def create_position_embedding(self) -> CachedLayer:
        return SinusoidalPositions()

    def create_encoder_position_embedding(self) -> CachedLayer:
        return SinusoidalPositions(sequence="source")


@register_architecture
class Marian(Bart):
    """The table of Marian."""

    model_type = "marian"
    causal_lm_class = "MarianMTModel"
    backbone_class = MarianBackbone
    config = {**Bart.config, "vocabulary_size": ("vocab_size", 58101)}
    constants = {**Bart.constants, "share_encoder_decoder_embeddings": True}
    ignored = ("embed_positions.weight",)

    def write_config(self, backbone: Any) -> dict[str, Any]:
        # By default these are beyond smaller vocabularies.
        last = backbone.vocabulary_size - 1
        tokens = dict.fromkeys(("pad_token_id", "decoder_start_token_id"), last)
        return {**super().write_config(backbone), **tokens}
