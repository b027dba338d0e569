"""GPT-2 and its kind: plain feed-forward layers, layer norms, biases."""

from tests.blocks.models.cases import (
    DECODER,
    DEFAULT,
    LINEAR,
    VOCABULARY_SIZE,
    case,
    like_others,
)

GPT2 = {
    "vocab_size": VOCABULARY_SIZE,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}
NEOX = {**DECODER, "hidden_size": 32, "rotary_pct": 0.5}
FALCON = {**DECODER, "ffn_hidden_size": 40, "alibi": False}
FALCON_40B = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
OPT = {**DECODER, "ffn_dim": 40, "max_position_embeddings": 32, "pad_token_id": 1}
BLOOM = {**DECODER, "n_layer": 2, "n_head": 4}

CASES = [
    case("GPT2", GPT2),
    like_others("GPT2-untied", GPT2, n_inner=20, tie_word_embeddings=False),
    like_others("GPTNeoX", NEOX),
    like_others(
        "GPTNeoX-sequential",
        NEOX,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_fast",
        rope_parameters={**LINEAR, "partial_rotary_factor": 0.25},
        tie_word_embeddings=True,
    ),
    like_others("Falcon-7B", FALCON),
    like_others("Falcon-40B", FALCON_40B),
    like_others(
        "Falcon-11B",
        FALCON_40B,
        num_ln_in_parallel_attn=1,
        ffn_hidden_size=None,
        activation="relu",
        rope_parameters=DEFAULT,
        tie_word_embeddings=False,
    ),
    case(
        "Falcon-RW",
        FALCON,
        hidden_size=32,
        # Slopes that bfloat16 rounds.
        num_attention_heads=16,
        alibi=True,
        # The eager one adds biases twice.
        attn_implementation="sdpa",
        multi_query=False,
        parallel_attn=False,
        bias=True,
    ),
    like_others("OPT", OPT),
    like_others(
        "OPT-norms_after",
        OPT,
        do_layer_norm_before=False,
        word_embed_proj_dim=16,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        activation_function="gelu",
    ),
    like_others("OPT-untied", OPT, word_embed_proj_dim=16, tie_word_embeddings=False),
    like_others("Bloom", BLOOM),
    like_others("Bloom-6_heads", BLOOM, n_head=6, tie_word_embeddings=False),
]
