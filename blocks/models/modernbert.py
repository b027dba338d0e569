"""ModernBERT."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, RotaryAttention
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import Dense, attention_paths, layer_lines
from blocks.custom_encoder_backbone import CustomEncoderBackbone
from blocks.layers.feed_forward import GatedFeedForward, published_activation
from blocks.models.mistral import LAYER_TYPES


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class ModernBertBackbone(CustomEncoderBackbone):
    """ModernBERT: rotary positions, gates, no biases, and a window in most blocks.

    Args:
        *args: those of `blocks.CustomEncoderBackbone`, also by keyword.
        full_every: int. Every how many blocks, from the first on, one has no window.
        window: int. How many positions a window has, to both sides together.
        rope_theta: number. The base of rotary positions of blocks without a window.
        local_rope_theta: number. That of the others.
        classifier_pooling: str. What text classifiers look at: `"cls"` or `"mean"`.
        **kwargs: as for `blocks.CustomEncoderBackbone`.

    Reference:

    - [Warner et al., 2024](https://arxiv.org/abs/2412.13663)
    """

    def __init__(
        self,
        *args: Any,
        full_every: int = 3,
        window: int = 128,
        rope_theta: float = 160_000.0,
        local_rope_theta: float = 10_000.0,
        classifier_pooling: str = "cls",
        **kwargs: Any,
    ) -> None:
        self.full_every = full_every
        self.window = window
        self.rope_theta = rope_theta
        self.local_rope_theta = local_rope_theta
        self.classifier_pooling = classifier_pooling
        fixed = {"num_token_types": None, "normalize_first": True}
        super().__init__(*args, **{**kwargs, **fixed, "learned_positions": False})

    def create_encoder(self, layer_index: int) -> keras.layers.Layer:
        block: Any = super().create_encoder(layer_index)
        if layer_index == 0:
            # The embeddings are normalized already.
            block.norm_names = ("ffn_norm",)
            block.attention_norm = keras.layers.Identity(name="attention_norm")
        return block

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        sliding = layer_index % self.full_every > 0
        return RotaryAttention(
            self.num_heads,
            max_wavelength=self.local_rope_theta if sliding else self.rope_theta,
            # The token itself and one side.
            window=self.window // 2 + 1 if sliding else None,
            causal=False,
            use_bias=False,
            dropout=self.dropout,
        )

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        activation = published_activation(self.activation)
        return GatedFeedForward(self.intermediate_dim, activation)

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, center=False
        )

    def create_head_transform(self, task: str) -> keras.layers.Layer:
        dense = keras.layers.Dense(
            self.hidden_dim, "gelu", use_bias=False, name="dense"
        )
        norm = keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, center=False, name="norm"
        )
        return keras.Sequential([dense, norm])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(ModernBertBackbone, self)}


# The tables of the heads: of the projection that all have, and of what follows it.
_HEADS: dict[str, dict[str, str]] = {
    task: {
        "head.dense.weight": f"{task}_transform/dense/kernel",
        "head.norm.weight": f"{task}_transform/norm/gamma",
        **layer_lines({"classifier": "classifier"}),
    }
    for task in ("text_classifier", "token_classifier", "masked_lm")
}
_HEADS["masked_lm"]["decoder.bias"] = "masked_lm_bias/bias"


@register_architecture
class ModernBert(Architecture):
    """The table of ModernBERT."""

    model_type = "modernbert"
    classes = {
        "backbone": "ModernBertModel",
        "masked_lm": "ModernBertForMaskedLM",
        "text_classifier": "ModernBertForSequenceClassification",
        "token_classifier": "ModernBertForTokenClassification",
    }
    backbone_class = ModernBertBackbone
    config = {
        "vocabulary_size": ("vocab_size", 50368),
        "num_layers": ("num_hidden_layers", 22),
        "num_heads": ("num_attention_heads", 12),
        "hidden_dim": ("hidden_size", 768),
        "intermediate_dim": ("intermediate_size", 1152),
        "activation": ("hidden_activation", "gelu"),
        "max_sequence_length": ("max_position_embeddings", 8192),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "full_every": ("global_attn_every_n_layers", 3),
        "window": ("local_attention", 128),
        "rope_theta": ("global_rope_theta", 160_000.0),
        "local_rope_theta": ("local_rope_theta", 10_000.0),
        "classifier_pooling": ("classifier_pooling", "cls"),
    }
    constants = {
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "decoder_bias": True,
        "tie_word_embeddings": True,
    }
    base_prefix = "model."
    weights = {
        "model.embeddings.tok_embeddings.weight": "token_embedding/embeddings",
        "model.embeddings.norm.weight": "embeddings_norm/gamma",
        "model.final_norm.weight": "layer_norm/gamma",
    }
    layer_prefix = "model.layers.{i}."
    layer_weights = {
        "attn_norm.weight": "attention_norm/gamma",
        "attn.Wqkv.weight": Dense(*attention_paths("kernel")),
        "attn.Wo.weight": "self_attention/attention_output/kernel",
        "mlp_norm.weight": "ffn_norm/gamma",
        "mlp.Wi.weight": Dense("ffn/gate/kernel", "ffn/intermediate/kernel"),
        "mlp.Wo.weight": "ffn/output/kernel",
    }
    head_weights = _HEADS
    head_prefixes = ("head.", "decoder.", "classifier.", "qa_outputs.")

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        # Newer files list the kinds of blocks, and have rotary positions by kind.
        kinds, ropes = config.get("layer_types"), config.get("rope_parameters") or {}
        spelled = dict(config)
        if kinds:
            full = [i for i, kind in enumerate(kinds) if kind == LAYER_TYPES[0]]
            every = full[1] if len(full) > 1 else len(kinds)
            if kinds != _layer_types(len(kinds), every):
                raise ValueError(
                    "The blocks without a window must follow at equal distances, the "
                    f"first one first. Received: layer_types={kinds}"
                )
            spelled["global_attn_every_n_layers"] = every
        for kind, name in zip(LAYER_TYPES, ("global_rope_theta", "local_rope_theta")):
            rope = ropes.get(kind) or {}
            if rope.get("rope_type", "default") != "default":
                raise ValueError(
                    "Rotary positions are computed here without scaling only. Received: "
                    f"rope_parameters={ropes}"
                )
            spelled[name] = rope.get("rope_theta", config.get(name))
        found = {key: value for key, value in spelled.items() if value is not None}
        return super().read_config(found)

    def write_config(self, backbone: Any) -> dict[str, Any]:
        thetas = (backbone.rope_theta, backbone.local_rope_theta)
        ropes = [{"rope_theta": theta, "rope_type": "default"} for theta in thetas]
        return {
            **super().write_config(backbone),
            "layer_types": _layer_types(backbone.num_layers, backbone.full_every),
            "rope_parameters": dict(zip(LAYER_TYPES, ropes)),
            # Its default lies beyond smaller vocabularies.
            "pad_token_id": None,
        }


def _layer_types(num_layers: int, full_every: int) -> list[str]:
    return [LAYER_TYPES[i % full_every > 0] for i in range(num_layers)]
