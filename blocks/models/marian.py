"""Marian, of which are the OPUS-MT models of translation."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention import CachedLayer, SinusoidalPositions
from attention.contract import Tensor, arguments_of
from blocks.checkpoints.architecture import register_architecture
from blocks.models.bart import Bart, BartBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MarianBackbone(BartBackbone):
    """Marian: BART with sines and cosines as positions, and no norm of embeddings.

    Args:
        *args: those of `BartBackbone`, also by keyword.
        source_vocabulary_size: int or `None`. The number of tokens of sources, which
            then have embeddings of their own; `None`: they have those of targets.

    Reference:

    - [Junczys-Dowmunt et al., 2018](https://arxiv.org/abs/1804.00344)
    """

    normalize_embedding = False

    def __init__(
        self, *args: Any, source_vocabulary_size: int | None = None, **kwargs: Any
    ) -> None:
        self.source_vocabulary_size = source_vocabulary_size
        super().__init__(*args, **kwargs)

    def embed_source(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.source_vocabulary_size is None:
            return super().embed_source(inputs)
        tokens, mask = inputs["encoder_token_ids"], inputs["encoder_padding_mask"]
        embedding = keras.layers.Embedding(
            self.source_vocabulary_size,
            self.hidden_dim,
            name="encoder_token_embedding",
        )
        x = self.add_positions(embedding(tokens), mask, "encoder_")
        return self.embeddings_dropout(x), ops.cast(mask, "bool")

    def create_position_embedding(self) -> CachedLayer:
        return SinusoidalPositions()

    def create_encoder_position_embedding(self) -> CachedLayer:
        return SinusoidalPositions(sequence="source")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(MarianBackbone, self)}


@register_architecture
class Marian(Bart):
    """The table of Marian."""

    model_type = "marian"
    causal_lm_class = "MarianMTModel"
    backbone_class = MarianBackbone
    config = {**Bart.config, "vocabulary_size": ("vocab_size", 58101)}
    ignored = ("embed_positions.weight",)

    def table(self, backbone: Any) -> dict[str, Any]:
        table = dict(self.weights)
        if backbone.source_vocabulary_size is not None:
            target = table.pop("model.shared.weight")
            table["model.decoder.embed_tokens.weight"] = target
            source = "encoder_token_embedding/embeddings"
            table["model.encoder.embed_tokens.weight"] = source
        return table

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        found = super().read_config(config)
        if not config.get("share_encoder_decoder_embeddings", True):
            size = found["source_vocabulary_size"] = found["vocabulary_size"]
            found["vocabulary_size"] = config.get("decoder_vocab_size") or size
        return found

    def write_config(self, backbone: Any) -> dict[str, Any]:
        size, source = backbone.vocabulary_size, backbone.source_vocabulary_size
        config = super().write_config(backbone)
        config["vocab_size"], config["decoder_vocab_size"] = source or size, size
        config["share_encoder_decoder_embeddings"] = source is None
        # By default these are beyond smaller vocabularies.
        last = min(source or size, size) - 1
        return {**config, "pad_token_id": last, "decoder_start_token_id": last}
