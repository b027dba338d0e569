"""Models with recurrent mixers."""

from tests.blocks.models.cases import (
    DECODER,
    LINEAR,
    VOCABULARY_SIZE,
    like_others,
)

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

CASES = [
    like_others("Qwen3Next", QWEN3_NEXT),
    like_others(
        "Qwen3Next-default_layers",
        QWEN3_NEXT,
        num_hidden_layers=4,
        layer_types=None,
        num_key_value_heads=1,
        linear_num_key_heads=4,
        linear_conv_kernel_dim=3,
        attention_bias=True,
        mlp_only_layers=[1],
        norm_topk_prob=False,
        rope_parameters={**LINEAR, "partial_rotary_factor": 0.5},
        tie_word_embeddings=True,
    ),
    like_others("Mamba2", MAMBA2),
    like_others(
        "Mamba2-biases",
        MAMBA2,
        expand=3,
        head_dim=18,
        n_groups=1,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        time_step_limit=[0.02, 0.1],
        tie_word_embeddings=True,
    ),
]
