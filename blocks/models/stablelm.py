"""StableLM 2: layer norms, and rotary positions in a part of each head."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention import CachedLayer, RotaryAttention
from attention.contract import Shape, Tensor, arguments_of, declare_axes
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import Stacked
from blocks.models.llama import Llama, LlamaBackbone
from blocks.parallel_decoder import OneNormDecoder


class StableLMHeadNorm(keras.layers.LayerNormalization):
    """A layer norm of each head, `(..., heads, dim)`, with scales of its own."""

    def build(self, inputs_shape: Shape) -> None:
        super().build(inputs_shape)
        declare_axes(self, {"head_scale": ("heads", None)})
        self.head_scale = self.add_weight(inputs_shape[-2:], "ones", name="head_scale")

    def call(self, x: Tensor) -> Tensor:
        return super().call(x) * ops.cast(self.head_scale, x.dtype)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class StableLMAttention(RotaryAttention):
    """Rotary attention with a layer norm of each query and key head."""

    def make_norm(self, name: str) -> keras.layers.Layer | None:
        if not self.query_key_norm:
            return None
        options = {"center": False, "scale": False, "dtype": self.dtype_policy}
        norm = StableLMHeadNorm(epsilon=self.norm_epsilon, name=name, **options)
        heads = self.query_heads() if name == "query_norm" else self.key_heads()
        norm.build((None, None, *heads))
        return norm


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class StableLMBackbone(LlamaBackbone):
    """StableLM: Llama with layer norms and rotary positions in a part of each head.

    Args:
        *args: those of `LlamaBackbone`; `attention_bias` is not for the output.
        query_key_norm: bool. Whether query and key heads have a layer norm each.
        parallel: bool. Whether attention and feed-forward layer share their inputs.

    Reference:

    - [Bellagente et al., 2024](https://arxiv.org/abs/2402.17834)
    """

    def __init__(
        self,
        *args: Any,
        query_key_norm: bool = False,
        parallel: bool = False,
        **kwargs: Any,
    ) -> None:
        self.query_key_norm = query_key_norm
        self.parallel = parallel
        if parallel:
            self.decoder_class = OneNormDecoder
        super().__init__(*args, **kwargs)

    def attention_options(self, layer_index: int) -> dict[str, Any]:
        epsilon = self.layer_norm_epsilon
        norm = {"query_key_norm": self.query_key_norm, "norm_epsilon": epsilon}
        return {**super().attention_options(layer_index), **norm, "output_bias": False}

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return StableLMAttention(**self.attention_options(layer_index))

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(epsilon=self.layer_norm_epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(StableLMBackbone, self)}


@register_architecture
class StableLM(Llama):
    """The table of StableLM."""

    model_type = "stablelm"
    transformers_class = "StableLmForCausalLM"
    backbone_class = StableLMBackbone
    config = {
        **{k: v for k, v in Llama.config.items() if k not in ("ffn_bias", "key_dim")},
        "num_key_value_heads": ("num_key_value_heads", 32),
        "max_sequence_length": ("max_position_embeddings", 4096),
        "layer_norm_epsilon": ("layer_norm_eps", 1e-5),
        "attention_bias": ("use_qkv_bias", False),
        "query_key_norm": ("qk_layernorm", False),
        "parallel": ("use_parallel_residual", False),
        "rotary_factor": ("partial_rotary_factor", 0.25),
    }
    weights = {
        **Llama.weights,
        "model.norm.weight": "layer_norm/gamma",
        "model.norm.bias": "layer_norm/beta",
    }
    layer_weights = {
        **Llama.layer_weights,
        "input_layernorm.weight": "attention_norm/gamma",
        "input_layernorm.bias": "attention_norm/beta",
        "post_attention_layernorm.weight": "ffn_norm/gamma",
        "post_attention_layernorm.bias": "ffn_norm/beta",
        **{
            f"self_attn.{x[0]}_layernorm.norms.{{e}}.weight": Stacked(
                f"self_attention/{x}_norm/head_scale"
            )
            for x in ("query", "key")
        },
    }
