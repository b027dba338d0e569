"""Mamba-2: blocks of a state space mixer and nothing else."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention import CachedLayer, Mamba2
from attention.contract import Shape, Tensor, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import Depthwise
from blocks.custom_backbone import CustomBackbone
from blocks.custom_decoder import CustomDecoder


class Mamba2Decoder(CustomDecoder):
    """A block without a feed-forward layer; its residual stream is float32."""

    norm_names = ("attention_norm",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, autocast=False, **kwargs)

    def create_ffn(self, inputs_shape: Shape) -> keras.layers.Layer:
        return keras.layers.Identity(name="ffn")  # without weights, and not called

    def transform(  # type: ignore[override]
        self, x: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        mixed = self.self_attention(self.attention_norm(x), padding_mask=padding_mask)
        mixed = self.residual_dropout(mixed)
        return ops.add(ops.cast(x, "float32"), ops.cast(mixed, "float32"))


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Mamba2Backbone(CustomBackbone):
    """Mamba-2, of which `intermediate_dim` is the inner width of the mixers.

    Args:
        *args: those of `blocks.CustomBackbone`, also by keyword.
        state_dim: int. See `attention.Mamba2`, and so are the others below.
        num_groups: int.
        kernel_size: int.
        use_bias: bool.
        convolution_bias: bool.
        step_limit: pair of numbers or `None`.

    Reference:

    - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
    """

    decoder_class = Mamba2Decoder

    def __init__(
        self,
        *args: Any,
        state_dim: int = 128,
        num_groups: int = 1,
        kernel_size: int = 4,
        use_bias: bool = False,
        convolution_bias: bool = True,
        step_limit: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.state_dim, self.num_groups = state_dim, num_groups
        self.kernel_size, self.step_limit = kernel_size, step_limit
        self.use_bias, self.convolution_bias = use_bias, convolution_bias
        kwargs["learned_positions"] = False
        super().__init__(*args, **kwargs)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        return Mamba2(
            self.num_heads,
            expand=self.intermediate_dim // self.hidden_dim,
            epsilon=self.layer_norm_epsilon,
            **arguments_of(Mamba2Backbone, self),
        )

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.RMSNormalization(epsilon=self.layer_norm_epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(Mamba2Backbone, self)}


@register_architecture
class Mamba2Table(Architecture):
    """The table of Mamba-2."""

    model_type = "mamba2"
    transformers_class = "Mamba2ForCausalLM"
    backbone_class = Mamba2Backbone
    config = {
        "vocabulary_size": ("vocab_size", 32768),
        "num_layers": ("num_hidden_layers", 64),
        "num_heads": ("num_heads", 128),
        "hidden_dim": ("hidden_size", 4096),
        "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "state_dim": ("state_size", 128),
        "num_groups": ("n_groups", 8),
        "kernel_size": ("conv_kernel", 4),
        "use_bias": ("use_bias", False),
        "convolution_bias": ("use_conv_bias", True),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    }
    # Residuals of float32 change nothing in float32, and no less in another dtype.
    constants = {"hidden_act": ("silu", "swish"), "rms_norm": True}
    base_prefix = "backbone."
    weights = {
        "backbone.embeddings.weight": "token_embedding/embeddings",
        "backbone.norm_f.weight": "layer_norm/scale",
        "lm_head.weight": "token_embedding/reverse_embeddings",
    }
    layer_prefix = "backbone.layers.{i}."
    layer_weights = {
        "norm.weight": "attention_norm/scale",
        "mixer.in_proj.weight": "self_attention/input/kernel",
        "mixer.in_proj.bias": "self_attention/input/bias",
        "mixer.conv1d.weight": Depthwise("self_attention/convolution/kernel"),
        "mixer.conv1d.bias": "self_attention/convolution/bias",
        "mixer.A_log": "self_attention/log_rate",
        "mixer.D": "self_attention/skip",
        "mixer.dt_bias": "self_attention/step_bias",
        "mixer.norm.weight": "self_attention/norm_scale",
        "mixer.out_proj.weight": "self_attention/output/kernel",
        "mixer.out_proj.bias": "self_attention/output/bias",
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        found = super().read_config(config)
        found["intermediate_dim"] = config.get("expand", 2) * found["hidden_dim"]
        low, high = config.get("time_step_limit") or (0.0, float("inf"))
        unlimited = low <= 0 and high == float("inf")
        return {**found, "step_limit": None if unlimited else [low, high]}

    def write_config(self, backbone: Any) -> dict[str, Any]:
        config = super().write_config(backbone)
        config["expand"] = backbone.intermediate_dim // backbone.hidden_dim
        config["head_dim"] = backbone.intermediate_dim // backbone.num_heads
        if backbone.step_limit is not None:
            config["time_step_limit"] = backbone.step_limit
        return config
