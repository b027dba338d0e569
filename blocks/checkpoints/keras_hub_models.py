"""A table of arguments and weights for each of KerasHub's backbones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from attention.contract import describe
from blocks.checkpoints.architecture import Architecture, Entry
from blocks.checkpoints.conversions import Arrays, Conversion, Dense, Plain, Shape

# Paths of weights hold these parts in KerasHub's backbones, and those in ours.
_PARTS = {
    "sequence_output_layernorm": "layer_norm",
    "self_attention_layer_norm": "attention_norm",
    "self_attention_layernorm": "attention_norm",
    "feedforward_layer_norm": "ffn_norm",
    "feedforward_layernorm": "ffn_norm",
    "feedforward_intermediate_dense": "ffn/intermediate",
    "feedforward_gate_dense": "ffn/gate",
    "feedforward_output_dense": "ffn/output",
}


class KerasHubModel(Architecture):
    """A backbone of KerasHub, as a published architecture that is computed here.

    Its arguments are read as a published configuration, so what the architecture
    refuses is an error here, too.

    Attributes:
        hub_class: str. The name of KerasHub's class.
        keys: dict from keys of configurations to the backbone's attributes.
        parts: dict from parts of paths of its weights to those of ours.
        heads_first: tuple of str. Ends of paths of kernels that are `(heads, width,
            size)` there.
    """

    hub_class: ClassVar[str]
    keys: ClassVar[dict[str, str]] = {
        "vocab_size": "vocabulary_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_query_heads",
        "num_key_value_heads": "num_key_value_heads",
        "hidden_size": "hidden_dim",
        "intermediate_size": "intermediate_dim",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    parts: ClassVar[dict[str, str]] = _PARTS
    heads_first: ClassVar[tuple[str, ...]] = ()

    def published_config(self, backbone: Any) -> dict[str, Any]:
        """Returns the published configuration of a backbone of KerasHub."""
        config = {key: getattr(backbone, name) for key, name in self.keys.items()}
        return {**config, "tie_word_embeddings": backbone.token_embedding.tie_weights}

    def model_type_of(self, backbone: Any) -> str:
        """Returns the `model_type` of the architecture that computes a backbone."""
        return self.model_type

    def our_path(self, path: str) -> str:
        """Returns the path of our weight for one of KerasHub's."""
        parts = path.replace("decoder_block_", "transformer_layer_").split("/")
        return "/".join(self.parts.get(part, part) for part in parts)

    def conversion(self, path: str) -> Conversion:
        """Returns how the weight of a path is read."""
        return _HeadsFirst(path) if path.endswith(self.heads_first) else Plain(path)

    def entries(self, backbone: Any) -> Iterator[Entry]:
        for weight in backbone.trainable_weights:
            yield Entry([weight.path], [weight.path], self.conversion(weight.path))


class _HeadsFirst(Plain):
    """A kernel `(heads, width, size)`; the weight is `(width, heads, size)`."""

    def tensor_shapes(self, shapes: Any, count: int) -> list[Shape]:
        width, heads, size = shapes[0]
        return [(heads, width, size)]

    def load(self, tensors: Arrays, shapes: Any) -> list[np.ndarray]:
        return [next(tensors).swapaxes(0, 1)]


def _check(backbone: Any, **expected: Any) -> None:
    """Raises an error if an argument of a backbone has another value."""
    for name, value in expected.items():
        found = getattr(backbone, name)
        if found != value:
            raise ValueError(
                f"A {type(backbone).__name__} is computed here for {name}={value!r} "
                f"only. Received: {name}={describe(found)}"
            )


def _linear(factor: float) -> dict[str, Any] | None:
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


class _GPT2(KerasHubModel):
    hub_class = "GPT2Backbone"
    model_type = "gpt2"
    keys = {
        "vocab_size": "vocabulary_size",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_embd": "hidden_dim",
        "n_inner": "intermediate_dim",
        "n_positions": "max_sequence_length",
    }


class _Llama(KerasHubModel):
    hub_class = "LlamaBackbone"
    model_type = "llama"
    keys = {**KerasHubModel.keys, "rope_theta": "rope_max_wavelength"}

    def published_config(self, backbone: Any) -> dict[str, Any]:
        # KerasHub takes it, and computes without it.
        _check(backbone, rope_position_scaling_factor=1.0)
        scaling = None
        if backbone.rope_frequency_adjustment_factor is not None:
            length = backbone.rope_pretraining_sequence_length
            scaling = {
                "rope_type": "llama3",
                "factor": backbone.rope_frequency_adjustment_factor,
                "low_freq_factor": backbone.rope_low_freq_factor,
                "high_freq_factor": backbone.rope_high_freq_factor,
                "original_max_position_embeddings": length,
            }
        return {**super().published_config(backbone), "rope_scaling": scaling}


class _Llama3(_Llama):
    hub_class = "Llama3Backbone"


class _Mistral(KerasHubModel):
    hub_class = "MistralBackbone"
    model_type = "mistral"
    keys = {**_Llama.keys, "head_dim": "head_dim", "sliding_window": "sliding_window"}

    def published_config(self, backbone: Any) -> dict[str, Any]:
        scaling = _linear(backbone.rope_scaling_factor)
        return {**super().published_config(backbone), "rope_scaling": scaling}


class _Qwen(_Mistral):
    hub_class = "QwenBackbone"
    model_type = "qwen2"
    keys = {
        **_Llama.keys,
        "sliding_window": "sliding_window_size",
        "use_sliding_window": "use_sliding_window_attention",
    }

    def published_config(self, backbone: Any) -> dict[str, Any]:
        # A window is in all blocks.
        return {**super().published_config(backbone), "max_window_layers": 0}


class _Qwen3(_Qwen):
    hub_class = "Qwen3Backbone"
    model_type = "qwen3"
    keys = {
        **_Llama.keys,
        "head_dim": "head_dim",
        "sliding_window": "sliding_window_size",
        "use_sliding_window": "sliding_window_size",
    }
    parts = {
        **_PARTS,
        "query_dense_layernorm": "query_norm",
        "key_dense_layernorm": "key_norm",
    }


class _Gemma(KerasHubModel):
    """Gemma 1 and 2, which are one class there."""

    hub_class = "GemmaBackbone"
    keys = {**KerasHubModel.keys, "head_dim": "head_dim"}
    parts = {
        "final_normalization": "layer_norm",
        "pre_attention_norm": "attention_norm",
        "attention": "self_attention",
        "pre_ffw_norm": "ffn_norm",
        "post_ffw_norm": "post_ffn_norm",
        "ffw_gating": "ffn/gate",
        "ffw_gating_2": "ffn/intermediate",
        "ffw_linear": "ffn/output",
    }
    heads_first = ("/query/kernel", "/key/kernel", "/value/kernel")

    def model_type_of(self, backbone: Any) -> str:
        norms = backbone.use_post_attention_norm
        _check(backbone, use_post_ffw_norm=norms)
        if norms:
            return "gemma2"
        _check(
            backbone,
            use_sliding_window_attention=False,
            attention_logit_soft_cap=None,
            final_logit_soft_cap=None,
            query_head_dim_normalize=True,
        )
        return "gemma"

    def published_config(self, backbone: Any) -> dict[str, Any]:
        config = super().published_config(backbone)
        by_head = backbone.query_head_dim_normalize
        width = backbone.hidden_dim // backbone.num_query_heads
        window = backbone.use_sliding_window_attention
        return {
            **config,
            "intermediate_size": backbone.intermediate_dim // 2,
            "sliding_window": backbone.sliding_window_size if window else None,
            "attn_logit_softcapping": backbone.attention_logit_soft_cap,
            "final_logit_softcapping": backbone.final_logit_soft_cap,
            # As Gemma 2 27B was published; KerasHub's blocks always take `head_dim`.
            "query_pre_attn_scalar": backbone.head_dim if by_head else width,
        }


class _Gemma3(_Gemma):
    hub_class = "Gemma3Backbone"

    def model_type_of(self, backbone: Any) -> str:
        _check(
            backbone,
            use_post_attention_norm=True,
            use_post_ffw_norm=True,
            use_query_key_norm=True,
            use_bidirectional_attention=False,
            is_embedding_model=False,
            vision_encoder=None,
            local_rope_scaling_factor=1.0,
        )
        return "gemma3_text"

    def published_config(self, backbone: Any) -> dict[str, Any]:
        scaling = _linear(backbone.global_rope_scaling_factor)
        return {
            **super().published_config(backbone),
            "intermediate_size": backbone.intermediate_dim,
            "rope_scaling": scaling,
        }


class _Phi3(KerasHubModel):
    hub_class = "Phi3Backbone"
    model_type = "phi3"
    keys = {
        **_Llama.keys,
        "max_position_embeddings": "max_sequence_length",
        "original_max_position_embeddings": "pretraining_sequence_length",
    }
    parts = {
        **_PARTS,
        "pre_attention_layernorm": "attention_norm",
        "attention": "self_attention",
        "post_attention_layernorm": "ffn_norm",
    }

    def published_config(self, backbone: Any) -> dict[str, Any]:
        config = super().published_config(backbone)
        if backbone.rope_scaling_type is None:
            return config
        scaling = {
            "rope_type": "longrope",
            "short_factor": backbone.rope_scaling_short_factor,
            "long_factor": backbone.rope_scaling_long_factor,
        }
        return {**config, "rope_scaling": scaling}


class _Falcon(KerasHubModel):
    """Falcon RW: KerasHub has only blocks with linear biases."""

    hub_class = "FalconBackbone"
    model_type = "falcon"
    keys = {
        "vocab_size": "vocabulary_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "hidden_size": "hidden_dim",
        "ffn_hidden_size": "intermediate_dim",
        "layer_norm_epsilon": "layer_norm_epsilon",
    }
    parts = {
        "final_layernorm": "layer_norm",
        "input_layernorm": "attention_norm",
        "attention": "self_attention",
        "query_dense": "query",
        "key_dense": "key",
        "value_dense": "value",
        "output_dense": "attention_output",
        "post_attention_layernorm": "ffn_norm",
        "dense_h_to_4h": "ffn/intermediate",
        "dense_4h_to_h": "ffn/output",
    }

    def published_config(self, backbone: Any) -> dict[str, Any]:
        flags = {"alibi": True, "bias": True}
        flags.update(multi_query=False, parallel_attn=False)
        return {**super().published_config(backbone), **flags}

    def conversion(self, path: str) -> Conversion:
        if path.endswith("attention_output/kernel"):
            return Dense(path, inputs=2, transposed=True)
        return super().conversion(path)


KERAS_HUB_MODELS = (
    _GPT2(),
    _Llama(),
    _Llama3(),
    _Mistral(),
    _Qwen(),
    _Qwen3(),
    _Gemma(),
    _Gemma3(),
    _Phi3(),
    _Falcon(),
)
