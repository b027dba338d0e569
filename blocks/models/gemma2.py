"""Gemma 2."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import Tensor, arguments_of
from blocks.checkpoints.architecture import register_architecture
from blocks.custom_decoder import CustomDecoder
from blocks.models.gemma import Gemma, GemmaBackbone
from blocks.models.mistral import LAYER_TYPES, without_unused_window, write_window


class Gemma2Decoder(CustomDecoder):
    """A block with norms before and after each part."""

    norm_names = ("attention_norm", "post_attention_norm", "ffn_norm", "post_ffn_norm")

    def transform(  # type: ignore[override]
        self, x: Tensor, padding_mask: Tensor = None, training: bool | None = None
    ) -> Tensor:
        h = self.self_attention(self.attention_norm(x), padding_mask=padding_mask)
        x = x + self.residual_dropout(self.post_attention_norm(h))
        h = self.post_ffn_norm(self.ffn(self.ffn_norm(x)))
        return x + self.residual_dropout(h)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Gemma2Backbone(GemmaBackbone):
    """Gemma 2: windows in some blocks, norms around each part, soft caps.

    Args:
        *args: those of `MistralBackbone`, also by keyword.
        query_scalar: number or `None`. Products of queries and keys are divided by its
            square root; `None`: the size of a head.
        attention_soft_cap: float or `None`. The soft cap of these.
        logit_soft_cap: float or `None`. The soft cap of the logits of tokens.

    Reference:

    - [Gemma 2, 2024](https://arxiv.org/abs/2408.00118)
    """

    decoder_class = Gemma2Decoder

    def __init__(
        self,
        *args: Any,
        query_scalar: float | None = None,
        attention_soft_cap: float | None = None,
        logit_soft_cap: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.query_scalar = query_scalar
        self.attention_soft_cap = attention_soft_cap
        self.logit_soft_cap = logit_soft_cap
        super().__init__(*args, **kwargs)

    def create_embedding(self) -> keras.layers.Layer:
        embedding = super().create_embedding()
        embedding.logit_soft_cap = self.logit_soft_cap
        return embedding

    def attention_options(self, layer_index: int) -> dict[str, Any]:
        options = super().attention_options(layer_index)
        options["logit_soft_cap"] = self.attention_soft_cap
        options["scale"] = (self.query_scalar or options["key_dim"]) ** -0.5
        return options

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(Gemma2Backbone, self)}


@register_architecture
class Gemma2(Gemma):
    """The table of Gemma 2."""

    model_type = "gemma2"
    transformers_class = "Gemma2ForCausalLM"
    backbone_class = Gemma2Backbone
    config = {
        **Gemma.config,
        "num_key_value_heads": ("num_key_value_heads", 4),
        "window": ("sliding_window", 4096),
        "layer_types": ("layer_types", None),
        "query_scalar": ("query_pre_attn_scalar", 256),
        "attention_soft_cap": ("attn_logit_softcapping", 50.0),
        "logit_soft_cap": ("final_logit_softcapping", 30.0),
    }
    constants = {
        "hidden_activation": ("gelu_pytorch_tanh", "gelu_new"),
        "use_bidirectional_attention": (False, None),
    }
    layer_weights = {
        **Gemma.layer_weights,
        "post_attention_layernorm.weight": "post_attention_norm/scale",
        "pre_feedforward_layernorm.weight": "ffn_norm/scale",
        "post_feedforward_layernorm.weight": "post_ffn_norm/scale",
    }
    # Which blocks have no window, where the configuration does not say.
    full_every = 2

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        arguments = super().read_config(config)
        if arguments["layer_types"] is None:
            every = config.get("sliding_window_pattern", self.full_every)
            numbers = range(1, arguments["num_layers"] + 1)
            arguments["layer_types"] = [LAYER_TYPES[i % every > 0] for i in numbers]
        return without_unused_window(arguments)

    def write_config(self, backbone: Any) -> dict[str, Any]:
        heads = backbone.attention_options(0)
        scalar = backbone.query_scalar or heads["key_dim"]
        written = {"query_pre_attn_scalar": scalar, **write_window(backbone)}
        return {**super().write_config(backbone), **written}
