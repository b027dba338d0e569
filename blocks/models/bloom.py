"""BLOOM: linear biases, and a norm after the embeddings."""

from __future__ import annotations

from typing import Any

import keras

from attention import AlibiBias, CachedLayer, MultiHeadAttention
from attention.contract import Shape, Tensor
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import DenseByGroup, attention_paths
from blocks.custom_backbone import CustomBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class BloomBackbone(CustomBackbone):
    """BLOOM: GPT-2 with linear biases as positions, and a norm after the embeddings.

    Args:
        *args: those of `blocks.CustomBackbone`, also by keyword.

    Reference:

    - [BigScience, 2022](https://arxiv.org/abs/2211.05100)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["learned_positions"] = False
        super().__init__(*args, **kwargs)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        position = AlibiBias(name="position")
        return MultiHeadAttention(
            self.num_heads, position=position, dropout=self.dropout
        )

    def transform(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        self.embedding_norm = keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, name="embedding_norm"
        )
        return super().transform(self.embedding_norm(x), padding_mask)


@register_architecture
class Bloom(Architecture):
    """The table of BLOOM."""

    model_type = "bloom"
    transformers_class = "BloomForCausalLM"
    backbone_class = BloomBackbone
    config = {
        "vocabulary_size": ("vocab_size", 250880),
        "num_layers": ("n_layer", 2),
        "num_heads": ("n_head", 8),
        "hidden_dim": ("hidden_size", 64),
        "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    aliases = {
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    constants = {"apply_residual_connection_post_layernorm": False}
    base_prefix = "transformer."
    weights = {
        "transformer.word_embeddings.weight": "token_embedding/embeddings",
        "transformer.word_embeddings_layernorm.weight": "embedding_norm/gamma",
        "transformer.word_embeddings_layernorm.bias": "embedding_norm/beta",
        "transformer.ln_f.weight": "layer_norm/gamma",
        "transformer.ln_f.bias": "layer_norm/beta",
        "lm_head.weight": "token_embedding/reverse_embeddings",
    }
    layer_prefix = "transformer.h.{i}."
    layer_weights = {
        "input_layernorm.weight": "attention_norm/gamma",
        "input_layernorm.bias": "attention_norm/beta",
        "self_attention.query_key_value.weight": DenseByGroup(
            *attention_paths("kernel")
        ),
        "self_attention.query_key_value.bias": DenseByGroup(*attention_paths("bias")),
        "self_attention.dense.weight": "self_attention/attention_output/kernel",
        "self_attention.dense.bias": "self_attention/attention_output/bias",
        "post_attention_layernorm.weight": "ffn_norm/gamma",
        "post_attention_layernorm.bias": "ffn_norm/beta",
        "mlp.dense_h_to_4h.weight": "ffn/intermediate/kernel",
        "mlp.dense_h_to_4h.bias": "ffn/intermediate/bias",
        "mlp.dense_4h_to_h.weight": "ffn/output/kernel",
        "mlp.dense_4h_to_h.bias": "ffn/output/bias",
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        arguments = super().read_config(config)
        return {**arguments, "intermediate_dim": 4 * arguments["hidden_dim"]}
