"""RWKV-7, as the flash-linear-attention library stores it."""

from __future__ import annotations

from typing import Any

import keras

from attention import CachedLayer, RWKVChannelMix, RWKVTimeMix
from attention.contract import Shape, Tensor, arguments_of
from blocks.checkpoints.architecture import Architecture, register_architecture
from blocks.checkpoints.conversions import Plain
from blocks.custom_backbone import CustomBackbone
from blocks.custom_decoder import CustomDecoder


class RWKV7Decoder(CustomDecoder):
    """A block that is given the first block's values, and returns its own."""

    @property
    def norm_names(self) -> tuple[str, ...]:  # type: ignore[override]
        first = ("pre_norm",) if self.layer_index == 0 else ()
        return (*first, "attention_norm", "ffn_norm")

    def transform(  # type: ignore[override]
        self, x: Tensor, value: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.layer_index == 0:
            x = self.pre_norm(x)
        outputs, value = self.self_attention(
            self.attention_norm(x), value, return_value=True, padding_mask=padding_mask
        )
        x = x + self.residual_dropout(outputs)
        x = self.add_residual(x, self.ffn_norm, self.ffn, padding_mask=padding_mask)
        return x, value


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RWKV7Backbone(CustomBackbone):
    """RWKV-7.

    Args:
        *args: those of `blocks.CustomBackbone`, also by keyword.
        decay_dim: int or `None`. See `attention.RWKVTimeMix`, and so are `rate_dim`,
            `value_dim` and `gate_dim`.
        norm_bias: bool. Whether norms have biases.

    Reference:

    - [Peng et al., 2025](https://arxiv.org/abs/2503.14456)
    """

    decoder_class = RWKV7Decoder

    def __init__(
        self,
        *args: Any,
        decay_dim: int | None = None,
        rate_dim: int | None = None,
        value_dim: int | None = None,
        gate_dim: int | None = None,
        norm_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        self.decay_dim, self.rate_dim = decay_dim, rate_dim
        self.value_dim, self.gate_dim = value_dim, gate_dim
        self.norm_bias = norm_bias
        kwargs["learned_positions"] = False
        super().__init__(*args, **kwargs)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int
    ) -> CachedLayer:
        names = ("decay_dim", "rate_dim", "value_dim", "gate_dim")
        return RWKVTimeMix(
            self.num_heads,
            value_residual=layer_index > 0,
            epsilon=self.layer_norm_epsilon * self.hidden_dim / self.num_heads,
            **{name: getattr(self, name) for name in names},
        )

    def create_ffn(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return RWKVChannelMix(self.intermediate_dim)

    def create_norm(self, inputs_shape: Shape, layer_index: int) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, center=self.norm_bias
        )

    def transform(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        x, first = self.transformer_layers[0](x, padding_mask=padding_mask)
        for block in self.transformer_layers[1:]:
            x, _ = block(x, first, padding_mask=padding_mask)
        return x

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(RWKV7Backbone, self)}


_MIX = "self_attention/"
# The inputs of a time mix, and what each goes through.
_NAMES = ("receptance", "decay", "key", "value", "rate", "gate")
_MIXED = list(zip("rwkvag", _NAMES))


@register_architecture
class RWKV7(Architecture):
    """The table of RWKV-7, which transformers does not have."""

    model_type = "rwkv7"
    backbone_class = RWKV7Backbone
    config = {
        "vocabulary_size": ("vocab_size", 32000),
        "num_layers": ("num_hidden_layers", 24),
        "hidden_dim": ("hidden_size", 2048),
        "intermediate_dim": ("intermediate_size", None),
        "decay_dim": ("decay_low_rank_dim", 64),
        "rate_dim": ("a_low_rank_dim", 64),
        "value_dim": ("v_low_rank_dim", 16),
        "gate_dim": ("gate_low_rank_dim", 128),
        "norm_bias": ("norm_bias", True),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    }
    constants = {"hidden_act": "sqrelu", "norm_first": True, "attn": None}
    base_prefix = "model."
    weights = {
        "model.embeddings.weight": "token_embedding/embeddings",
        "model.norm.weight": "layer_norm/gamma",
        "model.norm.bias": "layer_norm/beta",
        "lm_head.weight": "token_embedding/reverse_embeddings",
    }
    layer_prefix = "model.layers.{i}."
    layer_weights = {
        "pre_norm.weight": "pre_norm/gamma",
        "pre_norm.bias": "pre_norm/beta",
        "attn_norm.weight": "attention_norm/gamma",
        "attn_norm.bias": "attention_norm/beta",
        **{f"attn.x_{x}": Plain(f"{_MIX}mix_{y}", rank=3) for x, y in _MIXED},
        **{f"attn.{x}_proj.weight": f"{_MIX}{y}/kernel" for x, y in _MIXED},
        **{f"attn.{x}_lora.lora.0.weight": f"{_MIX}{y}_down/kernel" for x, y in _MIXED},
        **{f"attn.{x}_lora.lora.2.weight": f"{_MIX}{y}_up/kernel" for x, y in _MIXED},
        **{f"attn.{x}_lora.lora.2.bias": f"{_MIX}{y}_bias" for x, y in _MIXED},
        "attn.k_k": "self_attention/unit_scale",
        "attn.k_a": "self_attention/rate_scale",
        "attn.r_k": Plain("self_attention/bonus"),
        "attn.g_norm.weight": "self_attention/norm_scale",
        "attn.g_norm.bias": "self_attention/norm_bias",
        "attn.o_proj.weight": "self_attention/output/kernel",
        "ffn_norm.weight": "ffn_norm/gamma",
        "ffn_norm.bias": "ffn_norm/beta",
        "ffn.x_k": "ffn/mix_key",
        "ffn.key.weight": "ffn/key/kernel",
        "ffn.value.weight": "ffn/value/kernel",
    }

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        found = super().read_config(config)
        width, size = found["hidden_dim"], config.get("head_dim", 64)
        # Where files have both, the number of heads is not what counts.
        found["num_heads"] = width // size if size else config["num_heads"]
        inner = int(width * (config.get("hidden_ratio") or 4))
        found["intermediate_dim"] = found["intermediate_dim"] or -(-inner // 32) * 32
        return found
