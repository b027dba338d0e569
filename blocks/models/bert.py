"""BERT: `CustomEncoderBackbone` as it is; and MiniLM, E5, BGE, which are of it."""

from __future__ import annotations

from typing import ClassVar

from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import layer_lines
from blocks.custom_encoder_backbone import CustomEncoderBackbone


@register_architecture
class Bert(Architecture):
    """The table of BERT.

    Reference:

    - [Devlin et al., 2018](https://arxiv.org/abs/1810.04805)
    """

    model_type = "bert"
    classes = {
        "backbone": "BertModel",
        "masked_lm": "BertForMaskedLM",
        "text_classifier": "BertForSequenceClassification",
        "token_classifier": "BertForTokenClassification",
    }
    backbone_class = CustomEncoderBackbone
    config = {
        "vocabulary_size": ("vocab_size", 30522),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "hidden_dim": ("hidden_size", 768),
        "intermediate_dim": ("intermediate_size", 3072),
        "num_token_types": ("type_vocab_size", 2),
        "activation": ("hidden_act", "gelu"),
        "max_sequence_length": ("max_position_embeddings", 512),
        "layer_norm_epsilon": ("layer_norm_eps", 1e-12),
        "dropout": ("hidden_dropout_prob", 0.1),
    }
    constants = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    base_prefix = "bert."
    weights = {
        "bert.embeddings.word_embeddings.weight": "token_embedding/embeddings",
        "bert.embeddings.position_embeddings.weight": "position_embedding/embeddings",
        "bert.embeddings.token_type_embeddings.weight": (
            "token_type_embedding/embeddings"
        ),
        **layer_lines({"bert.embeddings.LayerNorm": "embeddings_norm"}),
    }
    layer_prefix = "bert.encoder.layer.{i}."
    layer_weights = layer_lines(
        {
            "attention.self.query": "self_attention/query",
            "attention.self.key": "self_attention/key",
            "attention.self.value": "self_attention/value",
            "attention.output.dense": "self_attention/attention_output",
            "attention.output.LayerNorm": "attention_norm",
            "intermediate.dense": "ffn/intermediate",
            "output.dense": "ffn/output",
            "output.LayerNorm": "ffn_norm",
        }
    )
    head_weights = {
        "masked_lm": {
            **layer_lines(
                {
                    "cls.predictions.transform.dense": "masked_lm_transform/dense",
                    "cls.predictions.transform.LayerNorm": "masked_lm_transform/norm",
                }
            ),
            "cls.predictions.bias": "masked_lm_bias/bias",
        },
        "text_classifier": layer_lines(
            {
                "bert.pooler.dense": "text_classifier_transform",
                "classifier": "classifier",
            }
        ),
        "token_classifier": layer_lines({"classifier": "classifier"}),
    }
    head_prefixes: ClassVar[tuple[str, ...]] = (
        "cls.",
        "classifier.",
        "qa_outputs.",
        "bert.pooler.",
        "pooler.",
    )
    ignored = ("embeddings.position_ids",)

    def spellings(self, name: str) -> list[str]:
        # The first files were written by TensorFlow.
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old = old.replace("LayerNorm.bias", "LayerNorm.beta")
        return [*super().spellings(name), *super().spellings(old)]
