"""Published architectures beside transformers, with the same random weights.

A new architecture is a line in `CASES`; its unusual configurations are lines, too.
"""

import functools
import warnings

import keras
import numpy as np
import pytest

from blocks import CausalLM
from tests.blocks.models.checks import (
    VOCABULARY_SIZE,
    check_greedy,
    check_logits,
    prompts,
)
from tests.helpers import to_numpy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# What configurations of the Llama kind have in common.
DECODER = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": VOCABULARY_SIZE,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NEOX = {**DECODER, "hidden_size": 32, "rotary_pct": 0.5}
FALCON = {**DECODER, "ffn_hidden_size": 40, "alibi": False}
OPT = {
    **DECODER,
    "ffn_dim": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
}
EXPERTS = {**DECODER, "num_local_experts": 5, "num_experts_per_tok": 2}
QWEN3_MOE = {
    **DECODER,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "decoder_sparse_step": 2,
    "norm_topk_prob": True,
}
YARN = {
    "rope_theta": 500.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT_OSS = {
    **EXPERTS,
    "head_dim": 8,
    "sliding_window": 3,
    "swiglu_limit": 0.5,
    "rope_parameters": {**YARN, "truncate": False},
}
DEEPSEEK = {
    **DECODER,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
}
BLOOM = {**DECODER, "n_layer": 2, "n_head": 4}


def unusual(value):
    """A case of an architecture that another case loads on every backend."""
    return pytest.param(value, marks=pytest.mark.slow)


# Each is the name of a transformers configuration, and its arguments.
FIRST = [
    ("GPT2Config", GPT2),
    unusual(("GPT2Config", {**GPT2, "n_inner": 20, "tie_word_embeddings": False})),
    ("LlamaConfig", DECODER),
    unusual(
        (
            "LlamaConfig",
            {
                **DECODER,
                "num_key_value_heads": 1,
                "head_dim": 10,
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": LLAMA3,
                "tie_word_embeddings": True,
            },
        )
    ),
]

LINEAR = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
# Windows that are shorter than the prompts.
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
MIXED = ["sliding_attention", "full_attention"]
# Soft caps and a scalar of the size of what they cap and scale.
GEMMA = {
    "head_dim": 10,
    "sliding_window": 3,
    "query_pre_attn_scalar": 3,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 2.0,
}
LLAMA_KIND = [
    pytest.param(
        ("Qwen2Config", {**DECODER, **SLIDING}), marks=pytest.mark.slow_on_jax
    ),
    unusual(
        (
            "Qwen2Config",
            {
                **DECODER,
                **SLIDING,
                "layer_types": MIXED,
                "num_key_value_heads": 1,
                "rope_parameters": LLAMA3,
                "tie_word_embeddings": True,
            },
        )
    ),
    pytest.param(
        ("Qwen3Config", {**DECODER, "head_dim": 10, "rms_norm_eps": 1e-2}),
        marks=pytest.mark.slow_on_jax,
    ),
    unusual(
        (
            "Qwen3Config",
            {
                **DECODER,
                **SLIDING,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "attention_bias": True,
                "rope_parameters": LINEAR,
                "tie_word_embeddings": True,
            },
        )
    ),
    pytest.param(
        ("MistralConfig", {**DECODER, "sliding_window": 3}),
        marks=pytest.mark.slow_on_jax,
    ),
    unusual(
        (
            "MistralConfig",
            {
                **DECODER,
                "num_key_value_heads": 1,
                "head_dim": 10,
                "sliding_window": None,
                "rope_parameters": LINEAR,
                "tie_word_embeddings": True,
            },
        )
    ),
    pytest.param(
        ("GemmaConfig", {**DECODER, "head_dim": 10}), marks=pytest.mark.slow_on_jax
    ),
    unusual(
        (
            "GemmaConfig",
            {
                **DECODER,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "attention_bias": True,
                "rope_parameters": LINEAR,
                "tie_word_embeddings": False,
            },
        )
    ),
    pytest.param(("Gemma2Config", {**DECODER, **GEMMA}), marks=pytest.mark.slow_on_jax),
    unusual(
        (
            "Gemma2Config",
            {
                **DECODER,
                **GEMMA,
                "layer_types": MIXED[::-1],
                "num_key_value_heads": 1,
                "attention_bias": True,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "rope_parameters": LLAMA3,
                "tie_word_embeddings": False,
            },
        )
    ),
    (
        "Gemma3TextConfig",
        {
            **DECODER,
            **GEMMA,
            "attn_logit_softcapping": None,
            "sliding_window_pattern": 2,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": None},
        },
    ),
    unusual(
        (
            "Gemma3TextConfig",
            {
                **DECODER,
                **GEMMA,
                "num_hidden_layers": 6,
                "num_key_value_heads": 1,
                "attention_bias": True,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "rms_norm_eps": 1e-2,
                "tie_word_embeddings": False,
            },
        )
    ),
    ("Olmo2Config", DECODER),
    unusual(
        (
            "Olmo2Config",
            {
                **DECODER,
                "num_key_value_heads": 1,
                "attention_bias": True,
                "rms_norm_eps": 1e-2,
                "rope_parameters": LLAMA3,
                "tie_word_embeddings": True,
            },
        )
    ),
    pytest.param(
        ("StableLmConfig", {**DECODER, "hidden_size": 32, "use_qkv_bias": True}),
        marks=pytest.mark.slow_on_jax,
    ),
    unusual(
        (
            "StableLmConfig",
            {
                **DECODER,
                "hidden_size": 32,
                "num_key_value_heads": 1,
                "qk_layernorm": True,
                "use_parallel_residual": True,
                "partial_rotary_factor": 0.5,
                "rope_parameters": LINEAR,
                "tie_word_embeddings": True,
            },
        )
    ),
    pytest.param(
        ("Phi3Config", {**DECODER, "sliding_window": 3}), marks=pytest.mark.slow_on_jax
    ),
    unusual(
        (
            "Phi3Config",
            {
                **DECODER,
                "hidden_size": 32,
                "num_key_value_heads": 1,
                "partial_rotary_factor": 0.5,
                "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
                "tie_word_embeddings": True,
            },
        )
    ),
]

OTHER_ATTENTION = [
    ("GPTNeoXConfig", NEOX),
    unusual(
        (
            "GPTNeoXConfig",
            {
                **NEOX,
                "use_parallel_residual": False,
                "attention_bias": False,
                "hidden_act": "gelu_fast",
                "rope_parameters": {
                    "rope_theta": 500.0,
                    "rope_type": "linear",
                    "factor": 2.0,
                    "partial_rotary_factor": 0.25,
                },
                "tie_word_embeddings": True,
            },
        )
    ),
    # Of 7B, 40B, 11B and RW.
    pytest.param(("FalconConfig", FALCON), marks=pytest.mark.slow_on_jax),
    unusual(
        (
            "FalconConfig",
            {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        )
    ),
    unusual(
        (
            "FalconConfig",
            {
                **FALCON,
                "new_decoder_architecture": True,
                "num_kv_heads": 2,
                "num_ln_in_parallel_attn": 1,
                "ffn_hidden_size": None,
                "activation": "relu",
                "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
                "tie_word_embeddings": False,
            },
        )
    ),
    (
        "FalconConfig",
        {
            **FALCON,
            "hidden_size": 32,
            # Slopes that bfloat16 rounds.
            "num_attention_heads": 16,
            "alibi": True,
            # The eager one adds biases twice.
            "attn_implementation": "sdpa",
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    pytest.param(("OPTConfig", OPT), marks=pytest.mark.slow_on_jax),
    unusual(
        (
            "OPTConfig",
            {
                **OPT,
                "do_layer_norm_before": False,
                "word_embed_proj_dim": 16,
                "enable_bias": False,
                "layer_norm_elementwise_affine": False,
                "activation_function": "gelu",
            },
        )
    ),
    unusual(
        (
            "OPTConfig",
            {**OPT, "word_embed_proj_dim": 16, "tie_word_embeddings": False},
        )
    ),
    pytest.param(("BloomConfig", BLOOM), marks=pytest.mark.slow_on_jax),
    unusual(("BloomConfig", {**BLOOM, "n_head": 6, "tie_word_embeddings": False})),
    pytest.param(("MixtralConfig", EXPERTS), marks=pytest.mark.slow_on_jax),
    unusual(
        (
            "MixtralConfig",
            {
                **EXPERTS,
                "num_key_value_heads": 1,
                "head_dim": 10,
                "sliding_window": 3,
                "num_experts_per_tok": 1,
                "tie_word_embeddings": True,
            },
        )
    ),
    pytest.param(("Qwen3MoeConfig", QWEN3_MOE), marks=pytest.mark.slow_on_jax),
    unusual(
        (
            "Qwen3MoeConfig",
            {
                **QWEN3_MOE,
                "head_dim": 10,
                "attention_bias": True,
                "use_sliding_window": True,
                "sliding_window": 3,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [0],
                "norm_topk_prob": False,
                "rms_norm_eps": 0.01,
                "tie_word_embeddings": True,
            },
        )
    ),
    pytest.param(("GptOssConfig", GPT_OSS), marks=pytest.mark.slow_on_jax),
    unusual(
        (
            "GptOssConfig",
            {
                **GPT_OSS,
                "attention_bias": False,
                "layer_types": ["full_attention", "sliding_attention"],
                "rope_parameters": None,
                "tie_word_embeddings": True,
            },
        )
    ),
    ("DeepseekV2Config", DEEPSEEK),
    unusual(
        (
            "DeepseekV2Config",
            {
                **DEEPSEEK,
                "q_lora_rank": 14,
                "topk_method": "group_limited_greedy",
                "n_group": 3,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
            },
        )
    ),
]

MAMBA2 = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 12,
    "state_size": 6,
    "n_groups": 2,
    "chunk_size": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN3_NEXT = {
    **DECODER,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "rms_norm_eps": 1e-3,
}
RECURRENT = [
    pytest.param(("Qwen3NextConfig", QWEN3_NEXT), marks=pytest.mark.slow_on_jax),
    unusual(
        (
            "Qwen3NextConfig",
            {
                **QWEN3_NEXT,
                "num_hidden_layers": 4,
                "layer_types": None,
                "num_key_value_heads": 1,
                "linear_num_key_heads": 4,
                "linear_conv_kernel_dim": 3,
                "attention_bias": True,
                "mlp_only_layers": [1],
                "norm_topk_prob": False,
                "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5},
                "tie_word_embeddings": True,
            },
        )
    ),
    pytest.param(("Mamba2Config", MAMBA2), marks=pytest.mark.slow_on_jax),
    unusual(
        (
            "Mamba2Config",
            {
                **MAMBA2,
                "expand": 3,
                "head_dim": 18,
                "n_groups": 1,
                "conv_kernel": 3,
                "use_bias": True,
                "use_conv_bias": False,
                "time_step_limit": [0.02, 0.1],
                "tie_word_embeddings": True,
            },
        )
    ),
]

CASES = [*FIRST, *LLAMA_KIND, *OTHER_ATTENTION, *RECURRENT]


def randomize(model):
    """Gives a torch model weights large enough that tokens differ in what follows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def case_name(case):
    return case[0].removesuffix("Config")


@pytest.fixture(params=CASES, ids=case_name, scope="module")
def models(request, tmp_path_factory):
    """A transformers model, and ours that is loaded from its folder."""
    name, arguments = request.param
    config = getattr(transformers, name)(**arguments)
    config._attn_implementation = arguments.get("attn_implementation", "eager")
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(reference)
    folder = tmp_path_factory.mktemp(name)
    reference.save_pretrained(folder)
    return reference, CausalLM.from_preset(str(folder))


def expected_logits(reference, row):
    with torch.no_grad():
        return reference(torch.tensor(row[None].astype("int64"))).logits[0].numpy()


def test_logits_through_padding_and_a_cache(models):
    reference, lm = models
    check_logits(lm, functools.partial(expected_logits, reference))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="compiles elsewhere")
def test_greedy_tokens_and_the_road_back(models, tmp_path):
    reference, lm = models
    check_greedy(lm, functools.partial(expected_logits, reference))
    lm.export_to_transformers(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            output_loading_info=True,
            attn_implementation=reference.config._attn_implementation,
        )
    assert type(exported) is type(reference)
    assert not any(info.values()), info
    row = prompts()["token_ids"][0]
    outputs, expected = (expected_logits(m, row) for m in (exported, reference))
    assert np.abs(outputs - expected).max() < 1e-5


@pytest.mark.slow
def test_the_language_model_of_gemma_3_with_images(tmp_path):
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"hidden_size": 16, "intermediate_size": 16, "image_size": 28, **heads}
    config = transformers.Gemma3Config(
        text_config={**DECODER, "head_dim": 10, "sliding_window": 3},
        vision_config={**images, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    reference = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomize(reference)
    reference.save_pretrained(tmp_path / "images")
    lm = CausalLM.from_preset(str(tmp_path / "images"))
    x = prompts()
    expected = expected_logits(reference, x["token_ids"][0])
    assert np.abs(to_numpy(lm(x))[0] - expected).max() < 1e-4
    lm.export_to_transformers(str(tmp_path / "text"))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(exported) is transformers.Gemma3ForCausalLM
    outputs = expected_logits(exported, x["token_ids"][0])
    assert np.abs(outputs - expected).max() < 1e-4
