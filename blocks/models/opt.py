"""OPT, and models of its architecture: Galactica."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from attention import CachedLayer, MultiHeadAttention
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import Plain
from blocks.custom_backbone import CustomBackbone
from blocks.layers.feed_forward import FeedForward, published_activation
from blocks.layers.projected_embedding import ProjectedEmbedding


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class OPTBackbone(CustomBackbone):
    """OPT: GPT-2 with ReLU; in its 350M, norms come after and embeddings are narrow.

    Args:
        *args: those of `blocks.CustomBackbone`, also by keyword.
        normalize_first: bool. Whether norms come before the attention and the
            feed-forward layer, or after their residual additions.
        embedding_dim: int or `None`. The width of embeddings; `None`: `hidden_dim`.
        use_bias: bool. Whether all projections have biases.
        scaled_norms: bool. Whether norms have scales and biases.
        activation: str. See `blocks.layers.feed_forward.published_activation`.

    Reference:

    - [Zhang et al., 2022](https://arxiv.org/abs/2205.01068)
    """

    def __init__(
        self,
        *args: Any,
        normalize_first: bool = True,
        embedding_dim: int | None = None,
        use_bias: bool = True,
        scaled_norms: bool = True,
        activation: str = "relu",
        **kwargs: Any,
    ) -> None:
        self.normalize_first = normalize_first
        self.embedding_dim = embedding_dim
        self.use_bias = use_bias
        self.scaled_norms = scaled_norms
        self.activation = activation
        super().__init__(*args, **kwargs)

    def create_embedding(self) -> keras.layers.Layer:
        if self.embedding_dim in (None, self.hidden_dim):
            return super().create_embedding()
        return ProjectedEmbedding(
            self.vocabulary_size,
            self.embedding_dim,
            tie_weights=self.tie_word_embeddings,
            hidden_dim=self.hidden_dim,
        )

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return MultiHeadAttention(
            self.num_heads, use_bias=self.use_bias, dropout=self.dropout
        )

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        activation = published_activation(self.activation)
        return FeedForward(self.intermediate_dim, activation, self.use_bias)

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon,
            center=self.scaled_norms,
            scale=self.scaled_norms,
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(OPTBackbone, self)}


class AfterTwo(Plain):
    """A tensor whose first two rows, those of padding, no weight has."""

    def tensor_shapes(self, shapes: Any, count: int) -> list[tuple[int, ...]]:
        rows, width = shapes[0]
        return [(rows + 2, width)]

    def load(self, tensors: Any, shapes: Any) -> list[np.ndarray]:
        return [next(tensors)[2:]]

    def save(self, weights: Any, count: int) -> list[np.ndarray]:
        return [np.concatenate([np.zeros_like(weights[0][:2]), weights[0]])]


@register_architecture
class OPT(Architecture):
    """The table of OPT."""

    model_type = "opt"
    transformers_class = "OPTForCausalLM"
    backbone_class = OPTBackbone
    config = {
        "vocabulary_size": ("vocab_size", 50272),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "hidden_dim": ("hidden_size", 768),
        "intermediate_dim": ("ffn_dim", 3072),
        "max_sequence_length": ("max_position_embeddings", 2048),
        "normalize_first": ("do_layer_norm_before", True),
        "embedding_dim": ("word_embed_proj_dim", None),
        "use_bias": ("enable_bias", True),
        "scaled_norms": ("layer_norm_elementwise_affine", True),
        "activation": ("activation_function", "relu"),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    constants = {"_remove_final_layer_norm": False}
    base_prefix = "model."
    weights = {
        "model.decoder.embed_tokens.weight": "token_embedding/embeddings",
        "model.decoder.project_in.weight": "token_embedding/project_in/kernel",
        "model.decoder.project_out.weight": "token_embedding/project_out/kernel",
        "model.decoder.embed_positions.weight": AfterTwo(
            "position_embedding/embeddings"
        ),
        "model.decoder.final_layer_norm.weight": "layer_norm/gamma",
        "model.decoder.final_layer_norm.bias": "layer_norm/beta",
        "lm_head.weight": "token_embedding/reverse_embeddings",
    }
    layer_prefix = "model.decoder.layers.{i}."
    layer_weights = {
        "self_attn_layer_norm.weight": "attention_norm/gamma",
        "self_attn_layer_norm.bias": "attention_norm/beta",
        "self_attn.q_proj.weight": "self_attention/query/kernel",
        "self_attn.q_proj.bias": "self_attention/query/bias",
        "self_attn.k_proj.weight": "self_attention/key/kernel",
        "self_attn.k_proj.bias": "self_attention/key/bias",
        "self_attn.v_proj.weight": "self_attention/value/kernel",
        "self_attn.v_proj.bias": "self_attention/value/bias",
        "self_attn.out_proj.weight": "self_attention/attention_output/kernel",
        "self_attn.out_proj.bias": "self_attention/attention_output/bias",
        "final_layer_norm.weight": "ffn_norm/gamma",
        "final_layer_norm.bias": "ffn_norm/beta",
        "fc1.weight": "ffn/intermediate/kernel",
        "fc1.bias": "ffn/intermediate/bias",
        "fc2.weight": "ffn/output/kernel",
        "fc2.bias": "ffn/output/bias",
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        arguments = super().read_config(config)
        width = arguments["embedding_dim"] or arguments["hidden_dim"]
        return {**arguments, "embedding_dim": width}
