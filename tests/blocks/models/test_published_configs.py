"""Configurations as files on the hub have them, beside what transformers makes of them."""

import pytest

from blocks.checkpoints.architecture import find_architecture

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99}
# What the files of each model type say besides its sizes.
SAID = {
    "llama": {"num_key_value_heads": 8, "rope_theta": 500.0, "rope_scaling": YARN},
    "qwen2": {"rope_theta": 1e6, "sliding_window": 9, "use_sliding_window": True},
    "qwen3": {"rope_scaling": YARN, "attention_bias": True, "max_window_layers": 9},
    "mistral": {"head_dim": 128, "sliding_window": None, "rope_theta": 1e6},
    "gemma": {"hidden_act": "gelu", "hidden_activation": None, "head_dim": 4},
    "gemma2": {"query_pre_attn_scalar": 144, "sliding_window": 9},
    "gemma3_text": {
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 2e6,
        "rope_local_base_freq": 500.0,
        "sliding_window_pattern": 5,
    },
    "olmo2": {"rope_theta": 500_000, "rope_scaling": None, "rms_norm_eps": 1e-6},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "qwen3_next": {"rope_theta": 1e7, "full_attention_interval": 3},
    "phi3": {"sliding_window": 9, "rope_scaling": None, "partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 500.0},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 8, "rope_theta": 5e5},
    "opt": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "bloom": {"n_embed": 96, "num_attention_heads": 8},
    "mixtral": {"sliding_window": None, "rope_theta": 1e5, "num_local_experts": 4},
    "qwen3_moe": {"num_experts": 16, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    "gpt_oss": {"rope_scaling": {**YARN, "truncate": False}, "rope_theta": 500.0},
    "deepseek_v2": {
        "num_experts_per_tok": 6,
        "n_shared_experts": 1,
        "q_lora_rank": None,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "bert": {"position_embedding_type": "absolute", "type_vocab_size": 1},
    "roberta": {"max_position_embeddings": 514, "layer_norm_eps": 1e-5},
    "xlm-roberta": {"max_position_embeddings": 514, "layer_norm_eps": 1e-5},
    "albert": {"embedding_size": 16, "num_hidden_groups": 3},
    "modernbert": {
        "global_attn_every_n_layers": 5,
        "global_rope_theta": 500.0,
        "local_rope_theta": 50.0,
        "local_attention": 6,
    },
}


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("model_type", SAID)
def test_old_spelling_and_what_is_left_out(model_type, said):
    config = {**SIZES, **(SAID[model_type] if said else {})}
    architecture = find_architecture(model_type)
    filled = transformers.AutoConfig.for_model(model_type, **config).to_dict()
    arguments, expected = map(architecture.read_config, (config, filled))
    heads = SIZES["num_attention_heads"]
    for found in (arguments, expected):
        found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
        found["key_dim"] = found.get("key_dim") or SIZES["hidden_size"] // heads
    assert arguments == expected


def test_gemma_3_with_images_says_nearly_nothing():
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    config = {"text_config": text, "vision_config": {}}
    filled = transformers.Gemma3Config(**config).to_dict()
    architecture = find_architecture("gemma3")
    arguments = architecture.read_config(config)
    assert arguments == architecture.read_config(filled)
    assert arguments["layer_types"].count("full_attention") == 5


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}),
        ("qwen2", {"hidden_act": "gelu"}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
    ],
)
def test_what_is_not_computed_is_refused(model_type, said):
    config = {**SIZES, **said}
    with pytest.raises(ValueError, match="computed here"):
        find_architecture(model_type).read_config(config)
