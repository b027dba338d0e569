"""Gemma 3, its language model."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, RotaryAttention
from attention.contract import Shape, arguments_of
from blocks.checkpoints.architecture import register_architecture, with_plain_rotary
from blocks.layers.norms import ZeroCenteredRMSNormalization
from blocks.models.gemma2 import Gemma2, Gemma2Backbone
from blocks.models.mistral import LAYER_TYPES


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Gemma3Attention(RotaryAttention):
    """Rotary attention whose `query_key_norm` multiplies by `1 + scale`."""

    def make_norm(self, name: str) -> keras.layers.Layer | None:
        norm = ZeroCenteredRMSNormalization(
            self.norm_epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build((None, None, *self.query_heads()))
        return norm


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Gemma3TextBackbone(Gemma2Backbone):
    """Gemma 3: normalized queries and keys, and another rotary base where windows are.

    Args:
        *args: those of `Gemma2Backbone`, also by keyword; `rope_theta` and
            `rope_scaling` are those of blocks without a window.
        local_rope_theta: number. The base of rotary positions of the other blocks.

    Reference:

    - [Gemma 3, 2025](https://arxiv.org/abs/2503.19786)
    """

    def __init__(
        self, *args: Any, local_rope_theta: float = 10_000.0, **kwargs: Any
    ) -> None:
        self.local_rope_theta = local_rope_theta
        super().__init__(*args, **kwargs)

    def attention_options(self, layer_index: int) -> dict[str, Any]:
        options = super().attention_options(layer_index)
        options.update(query_key_norm=True, norm_epsilon=self.layer_norm_epsilon)
        if self.is_sliding(layer_index):
            options.update(max_wavelength=self.local_rope_theta, scaling=None)
        return options

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return Gemma3Attention(**self.attention_options(layer_index))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(Gemma3TextBackbone, self)}


@register_architecture
class Gemma3Text(Gemma2):
    """The table of Gemma 3's language model."""

    model_type = "gemma3_text"
    transformers_class = "Gemma3ForCausalLM"
    backbone_class = Gemma3TextBackbone
    # Published files leave out all defaults.
    config = {
        **Gemma2.config,
        "vocabulary_size": ("vocab_size", 262_208),
        "num_layers": ("num_hidden_layers", 26),
        "num_heads": ("num_attention_heads", 8),
        "hidden_dim": ("hidden_size", 2304),
        "intermediate_dim": ("intermediate_size", 9216),
        "max_sequence_length": ("max_position_embeddings", 131_072),
        "attention_soft_cap": ("attn_logit_softcapping", None),
        "logit_soft_cap": ("final_logit_softcapping", None),
        "rope_theta": ("rope_theta", 1_000_000.0),
        "local_rope_theta": ("rope_local_base_freq", 10_000.0),
    }
    constants = {**Gemma2.constants, "attn_logit_softcapping": None}
    full_every = 6
    layer_weights = {
        **Gemma2.layer_weights,
        "self_attn.q_norm.weight": "self_attention/query_norm/scale",
        "self_attn.k_norm.weight": "self_attention/key_norm/scale",
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        ropes = config.get("rope_parameters") or {}
        full, local = ({"rope_parameters": ropes.get(kind)} for kind in LAYER_TYPES)
        read = super().read_config({**config, **full})
        local = with_plain_rotary(local)
        if local["rope_scaling"] is not None:
            raise ValueError(
                "The configuration scales the rotary positions of blocks with a window, "
                f"which is not computed here. Received: rope_parameters={ropes}"
            )
        theta = local.get("rope_theta", read["local_rope_theta"])
        return {**read, "local_rope_theta": theta}

    def write_config(self, backbone: Any) -> dict[str, Any]:
        written = super().write_config(backbone)
        local = {"rope_theta": backbone.local_rope_theta, "rope_type": "default"}
        ropes = dict(zip(LAYER_TYPES, (written["rope_parameters"], local)))
        return {**written, "rope_parameters": ropes}
