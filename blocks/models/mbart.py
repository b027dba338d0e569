"""mBART: BART of many languages, with norms before the layers."""

from __future__ import annotations

import keras

from blocks.checkpoints.architecture import register_architecture
from blocks.models.bart import Bart, BartBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MBartBackbone(BartBackbone):
    """mBART: BART with norms before the layers, and after the last.

    Args:
        *args: those of `BartBackbone`, also by keyword.

    Reference:

    - [Liu et al., 2020](https://arxiv.org/abs/2001.08210)
    """

    normalize_first = True


@register_architecture
class MBart(Bart):
    """The table of mBART."""

    model_type = "mbart"
    causal_lm_class = "MBartForConditionalGeneration"
    backbone_class = MBartBackbone
