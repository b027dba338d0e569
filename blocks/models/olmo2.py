"""OLMo 2: norms after each part."""

from __future__ import annotations

import keras

from attention import CachedLayer, RotaryAttention
from attention.contract import Shape, Tensor, declare_axes
from blocks.checkpoints.architecture import register_architecture
from blocks.custom_decoder import CustomDecoder
from blocks.models.llama import Llama, LlamaBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Olmo2Attention(RotaryAttention):
    """Rotary attention that normalizes queries, and keys, of all heads together."""

    def make_norm(self, name: str) -> keras.layers.Layer | None:
        norm = keras.layers.RMSNormalization(
            axis=(-2, -1), epsilon=self.norm_epsilon, dtype=self.dtype_policy, name=name
        )
        heads = self.query_heads() if name == "query_norm" else self.key_heads()
        norm.build((None, None, *heads))
        declare_axes(norm, {"scale": ("heads", None)})
        return norm


class Olmo2Decoder(CustomDecoder):
    """A block that normalizes what its parts return, before the sums."""

    def transform(  # type: ignore[override]
        self, x: Tensor, padding_mask: Tensor = None, training: bool | None = None
    ) -> Tensor:
        h = self.attention_norm(self.self_attention(x, padding_mask=padding_mask))
        x = x + self.residual_dropout(h)
        return x + self.residual_dropout(self.ffn_norm(self.ffn(x)))


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Olmo2Backbone(LlamaBackbone):
    """OLMo 2: Llama with norms after its parts, and of queries and keys.

    Args:
        *args: those of `LlamaBackbone`, also by keyword.

    Reference:

    - [OLMo 2, 2024](https://arxiv.org/abs/2501.00656)
    """

    decoder_class = Olmo2Decoder

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return Olmo2Attention(
            **self.attention_options(layer_index),
            query_key_norm=True,
            norm_epsilon=self.layer_norm_epsilon,
        )


@register_architecture
class Olmo2(Llama):
    """The table of OLMo 2."""

    model_type = "olmo2"
    transformers_class = "Olmo2ForCausalLM"
    backbone_class = Olmo2Backbone
    config = {
        **{k: v for k, v in Llama.config.items() if k != "ffn_bias"},
        "layer_norm_epsilon": ("rms_norm_eps", 1e-5),
    }
    layer_weights = {
        **Llama.layer_weights,
        "post_attention_layernorm.weight": "attention_norm/scale",
        "post_feedforward_layernorm.weight": "ffn_norm/scale",
        "self_attn.q_norm.weight": "self_attention/query_norm/scale",
        "self_attn.k_norm.weight": "self_attention/key_norm/scale",
    }
    del layer_weights["input_layernorm.weight"]
