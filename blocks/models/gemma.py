"""Gemma 1."""

from __future__ import annotations

import keras

from attention.contract import Shape, Tensor
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.tensor_files import DTYPE_NAMES
from blocks.layers.feed_forward import GatedFeedForward, gelu_approximate
from blocks.layers.norms import ZeroCenteredRMSNormalization
from blocks.models.llama import Llama
from blocks.models.mistral import MistralBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class GemmaBackbone(MistralBackbone):
    """Gemma: scaled embeddings, GeGLU, norms that multiply by `1 + scale`.

    Args:
        *args: those of `MistralBackbone`, also by keyword.

    Reference:

    - [Gemma, 2024](https://arxiv.org/abs/2403.08295)
    """

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return GatedFeedForward(
            self.intermediate_dim, gelu_approximate, use_bias=self.ffn_bias
        )

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return ZeroCenteredRMSNormalization(self.layer_norm_epsilon)

    def transform(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        # Rounded to the dtype that is computed in, as published.
        rounded = DTYPE_NAMES[keras.backend.standardize_dtype(x.dtype)].type
        factor = float(rounded(self.hidden_dim**0.5))
        return super().transform(x * factor, padding_mask)


@register_architecture
class Gemma(Llama):
    """The table of Gemma."""

    model_type = "gemma"
    transformers_class = "GemmaForCausalLM"
    backbone_class = GemmaBackbone
    config = {
        **{k: v for k, v in Llama.config.items() if k != "ffn_bias"},
        "num_key_value_heads": ("num_key_value_heads", 16),
        "key_dim": ("head_dim", 256),
        "max_sequence_length": ("max_position_embeddings", 8192),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    constants = {
        # Whichever it is, GELU's tanh approximation is meant.
        "hidden_act": ("gelu_pytorch_tanh", "gelu", "gelu_new"),
        "hidden_activation": ("gelu_pytorch_tanh", "gelu_new", None),
        "use_bidirectional_attention": (False, None),
    }
