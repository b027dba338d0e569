"""Grouped rotary blocks against KerasHub's Llama, from the same weights."""

import keras
import keras_hub
import numpy as np
import pytest

from attention import RotaryAttention
from blocks import CustomBackbone, GatedFeedForward
from tests.models import (
    PACKAGE,
    RAGGED,
    VOCABULARY_SIZE,
    make_lm,
    prompts,
    randomize,
    rows_of,
    to_numpy,
)


@keras.saving.register_keras_serializable(package=PACKAGE)
class LlamaLikeBackbone(CustomBackbone):
    def __init__(self, *args, scaling=None, **kwargs):
        self.scaling = scaling
        super().__init__(*args, **kwargs)

    def create_attention_layer(self, inputs_shape, layer_index):
        return RotaryAttention(
            self.num_heads,
            self.num_key_value_heads,
            use_bias=False,
            scaling=self.scaling,
        )

    def create_ffn(self, inputs_shape, layer_index):
        return GatedFeedForward(self.intermediate_dim)

    def create_norm(self, inputs_shape, layer_index):
        return keras.layers.RMSNormalization(epsilon=self.layer_norm_epsilon)

    def get_config(self):
        return {**super().get_config(), "scaling": self.scaling}


NAMES = {
    "self_attention_layernorm": "attention_norm",
    "feedforward_intermediate_dense": "ffn/intermediate",
    "feedforward_gate_dense": "ffn/gate",
    "feedforward_output_dense": "ffn/output",
    "feedforward_layernorm": "ffn_norm",
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def our_path(path: str) -> str:
    for theirs, ours in NAMES.items():
        path = path.replace(f"/{theirs}/", f"/{ours}/")
    return path.replace("sequence_output_layernorm", "layer_norm")


def make_pair(scaling=None, tie=False):
    llama3 = {}
    if scaling is not None:
        llama3 = {
            "rope_frequency_adjustment_factor": scaling["factor"],
            "rope_low_freq_factor": scaling["low_freq_factor"],
            "rope_high_freq_factor": scaling["high_freq_factor"],
            "rope_pretraining_sequence_length": scaling[
                "original_max_position_embeddings"
            ],
        }
    reference = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY_SIZE,
        num_layers=2,
        num_query_heads=4,
        hidden_dim=32,
        intermediate_dim=48,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        layer_norm_epsilon=1e-6,
        **llama3,
    )
    randomize(reference)
    backbone = LlamaLikeBackbone(
        vocabulary_size=VOCABULARY_SIZE,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        intermediate_dim=48,
        num_key_value_heads=2,
        layer_norm_epsilon=1e-6,
        learned_positions=False,
        tie_word_embeddings=tie,
        scaling=scaling,
    )
    ours = {w.path: w for w in backbone.weights}
    assert {our_path(w.path) for w in reference.weights} == set(ours)
    for weight in reference.weights:
        ours[our_path(weight.path)].assign(weight)
    return reference, backbone


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_hidden_states_are_equal(scaling):
    reference, backbone = make_pair(scaling)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCABULARY_SIZE, size=n).tolist() for n in (40, 7, 23)]
    x = prompts(rows)
    real = x["padding_mask"].astype(bool)
    expected, outputs = to_numpy(reference(x)), to_numpy(backbone(x))
    np.testing.assert_allclose(outputs[real], expected[real], atol=1e-4)


def test_scaling_makes_a_difference():
    _, plain = make_pair(None)
    _, scaled = make_pair(LLAMA3)
    x = prompts([list(range(30))])
    assert np.abs(to_numpy(plain(x)) - to_numpy(scaled(x))).max() > 1e-2


def test_greedy_tokens_are_equal():
    reference, backbone = make_pair(LLAMA3, tie=True)
    reference_lm = keras_hub.models.LlamaCausalLM(reference, preprocessor=None)
    reference_lm.compile(sampler="greedy")
    lm = make_lm(backbone)
    x = prompts(RAGGED, width=20)
    expected = reference_lm.generate(
        {k: v.copy() for k, v in x.items()}, stop_token_ids=None
    )
    outputs = lm.generate(x, stop_token_ids=None)
    assert rows_of(outputs) == rows_of(expected)
    restored = LlamaLikeBackbone.from_config(backbone.get_config())
    assert restored.scaling == LLAMA3
