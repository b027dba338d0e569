"""GPT-OSS: attention sinks, windows in every other block, experts with biases."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract import Shape, Tensor, arguments_of
from blocks.checkpoints.architecture import register_architecture
from blocks.checkpoints.conversions import Conversion, Plain
from blocks.layers.mixture_of_experts import MixtureOfExperts
from blocks.models.llama import Llama
from blocks.models.mistral import LAYER_TYPES, without_unused_window, write_window
from blocks.models.mixtral import Mixtral, MixtralBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class ClampedExperts(MixtureOfExperts):
    """Gated experts with biases that clamp what is inside.

    Args:
        *args: those of `MixtureOfExperts`, also by keyword.
        limit: float. What the gate is at most, and the rest in size.
        slope: float. The factor of the gate inside the sigmoid.
    """

    def __init__(
        self, *args: Any, limit: float = 7.0, slope: float = 1.702, **kwargs: Any
    ) -> None:
        kwargs["use_bias"] = True
        super().__init__(*args, **kwargs)
        self.limit = limit
        self.slope = slope

    def activate(self, inner: Tensor, gate: Tensor) -> Tensor:
        gate = ops.minimum(gate, self.limit)
        inner = ops.clip(inner, -self.limit, self.limit)
        return (inner + 1) * gate * ops.sigmoid(self.slope * gate)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "limit": self.limit, "slope": self.slope}


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class GptOssBackbone(MixtralBackbone):
    """GPT-OSS: Mixtral with attention sinks, biases, and experts that clamp.

    Args:
        *args: those of `MixtralBackbone`, also by keyword.
        limit: float. See `ClampedExperts`.
        slope: float. See `ClampedExperts`.

    Reference:

    - [OpenAI, 2025](https://arxiv.org/abs/2508.10925)
    """

    def __init__(
        self, *args: Any, limit: float = 7.0, slope: float = 1.702, **kwargs: Any
    ) -> None:
        self.limit = limit
        self.slope = slope
        super().__init__(*args, **kwargs)

    def attention_options(self, layer_index: int) -> dict[str, Any]:
        return {**super().attention_options(layer_index), "attention_sinks": True}

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        sizes = (self.num_experts, self.intermediate_dim, self.num_experts_per_token)
        return ClampedExperts(*sizes, limit=self.limit, slope=self.slope)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(GptOssBackbone, self)}


class Alternating(Conversion):
    """A tensor of which every other column is one weight's, the rest another's."""

    def tensor_shapes(self, shapes: Any, count: int) -> list[tuple[int, ...]]:
        *outer, size = shapes[0]
        return [(*outer, 2 * size)]

    def load(self, tensors: Any, shapes: Any) -> list[np.ndarray]:
        tensor = next(tensors)
        return [tensor[..., ::2], tensor[..., 1::2]]

    def save(self, weights: Any, count: int) -> list[np.ndarray]:
        first, second = weights
        return [np.stack([first, second], -1).reshape((*first.shape[:-1], -1))]


@register_architecture
class GptOss(Mixtral):
    """The table of GPT-OSS."""

    model_type = "gpt_oss"
    transformers_class = "GptOssForCausalLM"
    backbone_class = GptOssBackbone
    config = {
        **Mixtral.config,
        "key_dim": ("head_dim", 64),
        "max_sequence_length": ("max_position_embeddings", 131072),
        "attention_bias": ("attention_bias", True),
        "window": ("sliding_window", 128),
        "rope_theta": ("rope_theta", 150_000.0),
        "layer_types": ("layer_types", None),
        "num_experts": ("num_local_experts", 128),
        "num_experts_per_token": ("num_experts_per_tok", 4),
        "limit": ("swiglu_limit", 7.0),
        "slope": ("swiglu_alpha", 1.702),
    }
    layer_weights = {
        **Llama.layer_weights,
        "self_attn.sinks": "self_attention/sinks",
        "mlp.router.weight": "ffn/router/kernel",
        "mlp.router.bias": "ffn/router/bias",
        "mlp.experts.gate_up_proj": Alternating(
            "ffn/gate_kernels", "ffn/intermediate_kernels"
        ),
        "mlp.experts.gate_up_proj_bias": Alternating(
            "ffn/gate_biases", "ffn/intermediate_biases"
        ),
        "mlp.experts.down_proj": Plain("ffn/output_kernels"),
        "mlp.experts.down_proj_bias": Plain("ffn/output_biases"),
    }
    rotary = {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        if not (config.get("rope_parameters") or config.get("rope_scaling")):
            config = {**config, "rope_scaling": self.rotary}
        read = super().read_config(config)
        numbers = range(read["num_layers"])
        default = [LAYER_TYPES[(i + 1) % 2] for i in numbers]
        read["layer_types"] = read["layer_types"] or default
        return without_unused_window(read)

    def write_config(self, backbone: Any) -> dict[str, Any]:
        return {**super().write_config(backbone), **write_window(backbone)}
