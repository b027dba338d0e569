"""ALBERT: BERT whose blocks share weights, with narrow embeddings."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import Tensor, arguments_of, declare_axes
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import layer_lines
from blocks.custom_encoder_backbone import CustomEncoderBackbone
from blocks.models.bert import Bert


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class AlbertBackbone(CustomEncoderBackbone):
    """ALBERT: the blocks of a group are one block, used again.

    Args:
        *args: those of `blocks.CustomEncoderBackbone`, also by keyword.
        embedding_dim: int. The width of embeddings.
        num_groups: int. How many blocks have weights of their own.

    Reference:

    - [Lan et al., 2019](https://arxiv.org/abs/1909.11942)
    """

    def __init__(
        self, *args: Any, embedding_dim: int = 128, num_groups: int = 1, **kwargs: Any
    ) -> None:
        self.embedding_dim = embedding_dim
        self.num_groups = num_groups
        super().__init__(*args, **kwargs)

    def group_of(self, layer_index: int) -> int:
        """Returns the number of the group of a depth."""
        return int(layer_index / (self.num_layers / self.num_groups))

    def _create_layers(self) -> None:
        super()._create_layers()
        self.embedding_projection = keras.layers.Dense(
            self.hidden_dim, name="embedding_projection"
        )
        declare_axes(self.embedding_projection, {"kernel": (None, None)})

    def create_embedding(self) -> keras.layers.Layer:
        return keras.layers.ReversibleEmbedding(
            self.vocabulary_size,
            self.embedding_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def embed(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.embedding_projection(super().embed(*args, **kwargs))

    def create_encoder(self, layer_index: int) -> keras.layers.Layer:
        for depth, block in enumerate(self.transformer_layers):
            if self.group_of(depth) == self.group_of(layer_index):
                return block
        return super().create_encoder(layer_index)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(AlbertBackbone, self)}


@register_architecture
class Albert(Bert):
    """The table of ALBERT."""

    model_type = "albert"
    classes = {x: y.replace("Bert", "Albert") for x, y in Bert.classes.items()}
    backbone_class = AlbertBackbone
    config = {
        **Bert.config,
        "vocabulary_size": ("vocab_size", 30000),
        "num_heads": ("num_attention_heads", 64),
        "hidden_dim": ("hidden_size", 4096),
        "intermediate_dim": ("intermediate_size", 16384),
        "activation": ("hidden_act", "gelu_new"),
        "dropout": ("hidden_dropout_prob", 0.0),
        "embedding_dim": ("embedding_size", 128),
        "num_groups": ("num_hidden_groups", 1),
    }
    constants = {**Bert.constants, "inner_group_num": 1}
    base_prefix = "albert."
    weights = {
        **{f"al{name}": path for name, path in Bert.weights.items()},
        **layer_lines(
            {"albert.encoder.embedding_hidden_mapping_in": "embedding_projection"}
        ),
    }
    layer_prefix = "albert.encoder.albert_layer_groups.{i}.albert_layers.0."
    layer_weights = layer_lines(
        {
            "attention.query": "self_attention/query",
            "attention.key": "self_attention/key",
            "attention.value": "self_attention/value",
            "attention.dense": "self_attention/attention_output",
            "attention.LayerNorm": "attention_norm",
            "ffn": "ffn/intermediate",
            "ffn_output": "ffn/output",
            "full_layer_layer_norm": "ffn_norm",
        }
    )
    head_weights = {
        "masked_lm": {
            **layer_lines(
                {
                    "predictions.dense": "masked_lm_transform/dense",
                    "predictions.LayerNorm": "masked_lm_transform/norm",
                }
            ),
            "predictions.bias": "masked_lm_bias/bias",
        },
        "text_classifier": layer_lines(
            {
                "albert.pooler": "text_classifier_transform",
                "classifier": "classifier",
            }
        ),
        "token_classifier": Bert.head_weights["token_classifier"],
    }
    head_prefixes = (
        "predictions.",
        "sop_classifier.",
        "classifier.",
        "qa_outputs.",
        "albert.pooler.",
        "pooler.",
    )

    def block_prefix(self, backbone: Any, layer_index: int) -> str:
        return self.layer_prefix.format(i=backbone.group_of(layer_index))
