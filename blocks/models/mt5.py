"""mT5: T5 1.1 of many languages."""

from __future__ import annotations

from typing import Any

from blocks.checkpoints.architecture import register_architecture
from blocks.models.t5 import T5


@register_architecture
class MT5(T5):
    """The table of mT5, which is written as T5.

    Reference:

    - [Xue et al., 2020](https://arxiv.org/abs/2010.11934)
    """

    model_type = "mt5"
    causal_lm_class = "MT5ForConditionalGeneration"
    config = {
        **T5.config,
        "vocabulary_size": ("vocab_size", 250112),
        "num_encoder_layers": ("num_layers", 8),
        "num_heads": ("num_heads", 6),
        "intermediate_dim": ("d_ff", 1024),
        "activation": ("feed_forward_proj", "gated-gelu"),
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        # Newer files say that embeddings are tied, and none scales hidden states.
        return super().read_config({**config, "tie_word_embeddings": False})
