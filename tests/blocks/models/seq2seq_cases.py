"""Models of a source and a target."""

from tests.blocks.models.cases import (
    DEFAULT,
    LINEAR,
    VOCABULARY_SIZE,
    case,
    like_others,
)

T5 = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    # Several distances share a bucket.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 7,
}
T5_1_1 = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 2,
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    "max_position_embeddings": 16,
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id"), 0),
}
# 9 positions.
WHISPER = {
    **BART,
    "num_mel_bins": 5,
    "max_source_positions": 9,
    "max_target_positions": 16,
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    "begin_suppress_tokens": None,
}
MOONSHINE = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 2,
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    "max_position_embeddings": 32,
    # 6 of 8 dimensions are rotated.
    "rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.8},
}

CASES = [
    case("T5", T5, num_decoder_layers=3, layer_norm_epsilon=1e-3),
    like_others("T5-1.1", T5_1_1),
    like_others("T5-tied_gates", T5, feed_forward_proj="gated-silu"),
    like_others("MT5", T5_1_1, num_decoder_layers=1),
    case("Bart", BART),
    like_others("Bart-scaled", BART, scale_embedding=True),
    like_others("MBart", BART, scale_embedding=True),
    case("Marian", BART, scale_embedding=True, activation_function="swish"),
    like_others("Marian-unscaled", BART, activation_function="gelu_new"),
    like_others(
        "Marian-two_vocabularies",
        BART,
        vocab_size=VOCABULARY_SIZE + 3,
        decoder_vocab_size=VOCABULARY_SIZE,
        share_encoder_decoder_embeddings=False,
    ),
    like_others("Pegasus", BART, scale_embedding=True, activation_function="relu"),
    case("Whisper", WHISPER),
    like_others("Whisper-untied", WHISPER, tie_word_embeddings=False),
    case("Moonshine", MOONSHINE),
    like_others(
        "Moonshine-biases",
        MOONSHINE,
        attention_bias=True,
        pad_head_dim_to_multiple_of=16,
        rope_parameters={**LINEAR, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
    ),
]
