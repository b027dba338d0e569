"""Falcon: 7B, 40B, 11B, and RW with linear biases."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention import AlibiBias, CachedLayer, GroupedQueryAttention
from attention.contract import Shape, Tensor, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.models.bloom import Bloom
from blocks.models.gpt_neox import GPTNeoXBackbone


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class FalconAlibi(AlibiBias):
    """Linear biases as Falcon was trained with: scaled, and in bfloat16.

    Args:
        scale: float. Their factor, that of the products of queries and keys.
    """

    def __init__(self, scale: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = scale

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        slopes = _to_bfloat16(ops.convert_to_tensor(self.slopes))[:, None]
        # (..., heads, length)
        query, key = (
            _to_bfloat16(slopes * ops.cast(x, "float32")[..., None, :]) * self.scale
            for x in (query_positions, key_positions)
        )
        # Those of keys are all that counts; the differences are small numbers.
        return key[..., None, :] - query[..., :, None]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale}


def _to_bfloat16(x: Tensor) -> Tensor:
    """Rounds as a cast to bfloat16 and back does, which XLA would leave out."""
    # `view` on TensorFlow needs to know the last size.
    bits = ops.view(x[..., None], "int32")
    bits = bits + 0x7FFF + ops.bitwise_and(ops.right_shift(bits, 16), 1)
    return ops.view(ops.bitwise_and(bits, -0x10000), "float32")[..., 0]


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class FalconBackbone(GPTNeoXBackbone):
    """Falcon: parallel blocks with few key/value heads.

    Args:
        *args: those of `GPTNeoXBackbone`, also by keyword.
        alibi: bool. Whether there are linear biases in place of rotary positions.

    Reference:

    - [Almazrouei et al., 2023](https://arxiv.org/abs/2311.16867)
    """

    def __init__(self, *args: Any, alibi: bool = False, **kwargs: Any) -> None:
        self.alibi = alibi
        kwargs["rotary_fraction"] = 1.0
        super().__init__(*args, **kwargs)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        if not self.alibi:
            return super().create_attention_layer(inputs_shape, layer_index)
        scale = (self.hidden_dim // self.num_heads) ** -0.5
        return GroupedQueryAttention(
            self.num_heads,
            self.num_key_value_heads or self.num_heads,
            use_bias=self.attention_bias,
            position=FalconAlibi(scale, name="position"),
            dropout=self.dropout,
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(FalconBackbone, self)}


@register_architecture
class Falcon(Architecture):
    """The table of Falcon."""

    model_type = "falcon"
    transformers_class = "FalconForCausalLM"
    backbone_class = FalconBackbone
    config = {
        "vocabulary_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "hidden_dim": "hidden_size",
        "intermediate_dim": ("ffn_hidden_size", None),
        "num_key_value_heads": ("num_kv_heads", None),
        "max_sequence_length": ("max_position_embeddings", 2048),
        "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "activation": ("activation", "gelu"),
        "attention_bias": ("bias", False),
        "alibi": ("alibi", False),
        "parallel_norms": ("num_ln_in_parallel_attn", None),
        "rope_theta": ("rope_theta", 10_000.0),
        "rope_scaling": ("rope_scaling", None),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    }
    # All but the norm of embeddings, which it lacks.
    base_prefix = Bloom.base_prefix
    weights = Bloom.weights
    layer_prefix = Bloom.layer_prefix
    layer_weights = Bloom.layer_weights

    def layer_table(self, backbone: Any) -> dict[str, Any]:
        table = dict(self.layer_weights)
        if backbone.parallel_norms == 2:
            for end in ("weight", "bias"):
                table[f"ln_attn.{end}"] = table.pop(f"input_layernorm.{end}")
                table[f"ln_mlp.{end}"] = table.pop(f"post_attention_layernorm.{end}")
        return table

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        read = super().read_config(config)
        many = config.get("new_decoder_architecture")
        if not many:
            read["num_key_value_heads"] = 1 if config.get("multi_query", True) else None
        read["intermediate_dim"] = read["intermediate_dim"] or 4 * read["hidden_dim"]
        read["ffn_bias"] = read["attention_bias"]
        norms = (read["parallel_norms"] or 2) if many else 1
        parallel = many or config.get("parallel_attn", True)
        return {**read, "parallel_norms": norms if parallel else 0}

    def write_config(self, backbone: Any) -> dict[str, Any]:
        norms, groups = backbone.parallel_norms, backbone.num_key_value_heads
        flags = {
            "new_decoder_architecture": norms == 2 or groups not in (1, None),
            "multi_query": groups == 1,
            "parallel_attn": norms > 0,
        }
        return {**super().write_config(backbone), **flags}
