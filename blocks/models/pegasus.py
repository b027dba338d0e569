"""Pegasus."""

from __future__ import annotations

import keras

from blocks.checkpoints.architecture import register_architecture
from blocks.models.marian import Bart, MarianBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class PegasusBackbone(MarianBackbone):
    """Pegasus: Marian with norms before the layers.

    Args:
        *args: those of `BartBackbone`, also by keyword.

    Reference:

    - [Zhang et al., 2019](https://arxiv.org/abs/1912.08777)
    """

    normalize_first = True


@register_architecture
class Pegasus(Bart):
    """The table of Pegasus."""

    model_type = "pegasus"
    causal_lm_class = "PegasusForConditionalGeneration"
    backbone_class = PegasusBackbone
    ignored = ("embed_positions.weight",)
