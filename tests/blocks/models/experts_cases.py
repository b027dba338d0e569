"""Models with experts."""

from tests.blocks.models.cases import (
    DECODER,
    YARN,
    case,
    like_others,
)

MIXTRAL = {**DECODER, "num_local_experts": 5, "num_experts_per_tok": 2}
QWEN3_MOE = {
    **DECODER,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "decoder_sparse_step": 2,
    "norm_topk_prob": True,
}
GPT_OSS = {
    **MIXTRAL,
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

CASES = [
    like_others("Mixtral", MIXTRAL),
    like_others(
        "Mixtral-window",
        MIXTRAL,
        num_key_value_heads=1,
        head_dim=10,
        sliding_window=3,
        num_experts_per_tok=1,
        tie_word_embeddings=True,
    ),
    like_others("Qwen3Moe", QWEN3_MOE),
    like_others(
        "Qwen3Moe-window",
        QWEN3_MOE,
        head_dim=10,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=3,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
        norm_topk_prob=False,
        rms_norm_eps=0.01,
        tie_word_embeddings=True,
    ),
    like_others("GptOss", GPT_OSS),
    like_others(
        "GptOss-tied",
        GPT_OSS,
        attention_bias=False,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters=None,
        tie_word_embeddings=True,
    ),
    case("DeepseekV2", DEEPSEEK),
    like_others(
        "DeepseekV2-groups",
        DEEPSEEK,
        q_lora_rank=14,
        topk_method="group_limited_greedy",
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
    ),
]
