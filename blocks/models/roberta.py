"""RoBERTa: BERT whose positions begin after those of padding."""

from __future__ import annotations

from typing import Any

import keras

from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import layer_lines
from blocks.custom_encoder_backbone import CustomEncoderBackbone
from blocks.models.bert import Bert
from blocks.models.opt import AfterTwo

# How many rows of the table of positions are none: 0, and that of padding.
UNUSED = 2


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RobertaBackbone(CustomEncoderBackbone):
    """RoBERTa: BERT, trained otherwise.

    Args:
        *args: those of `blocks.CustomEncoderBackbone`, also by keyword.

    Reference:

    - [Liu et al., 2019](https://arxiv.org/abs/1907.11692)
    """


@register_architecture
class Roberta(Bert):
    """The table of RoBERTa."""

    model_type = "roberta"
    classes = {x: y.replace("Bert", "Roberta") for x, y in Bert.classes.items()}
    backbone_class = RobertaBackbone
    config = {**Bert.config, "vocabulary_size": ("vocab_size", 50265)}
    constants = {**Bert.constants, "pad_token_id": 1}
    base_prefix = "roberta."
    weights = {
        **{x.replace("bert", "roberta"): y for x, y in Bert.weights.items()},
        "roberta.embeddings.position_embeddings.weight": AfterTwo(
            "position_embedding/embeddings"
        ),
    }
    layer_prefix = "roberta.encoder.layer.{i}."
    head_weights = {
        "masked_lm": {
            **layer_lines(
                {
                    "lm_head.dense": "masked_lm_transform/dense",
                    "lm_head.layer_norm": "masked_lm_transform/norm",
                }
            ),
            "lm_head.bias": "masked_lm_bias/bias",
        },
        "text_classifier": layer_lines(
            {
                "classifier.dense": "text_classifier_transform",
                "classifier.out_proj": "classifier",
            }
        ),
        "token_classifier": Bert.head_weights["token_classifier"],
    }
    head_prefixes = (
        "lm_head.",
        "classifier.",
        "qa_outputs.",
        "roberta.pooler.",
        "pooler.",
    )

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        arguments = super().read_config(config)
        length = arguments["max_sequence_length"] - UNUSED
        return {**arguments, "max_sequence_length": length}

    def write_config(self, backbone: Any) -> dict[str, Any]:
        config = super().write_config(backbone)
        length = backbone.max_sequence_length + UNUSED
        return {**config, "max_position_embeddings": length}
