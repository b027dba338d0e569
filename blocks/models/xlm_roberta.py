"""XLM-RoBERTa: RoBERTa of a hundred languages."""

from __future__ import annotations

import keras

from blocks.checkpoints.architecture import register_architecture
from blocks.models.roberta import Roberta, RobertaBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class XLMRobertaBackbone(RobertaBackbone):
    """XLM-RoBERTa: RoBERTa, trained on other text.

    Args:
        *args: those of `blocks.CustomEncoderBackbone`, also by keyword.

    Reference:

    - [Conneau et al., 2020](https://arxiv.org/abs/1911.02116)
    """


@register_architecture
class XLMRoberta(Roberta):
    """The table of XLM-RoBERTa, which is written as RoBERTa."""

    model_type = "xlm-roberta"
    backbone_class = XLMRobertaBackbone
    classes = {x: f"XLM{y}" for x, y in Roberta.classes.items()}
