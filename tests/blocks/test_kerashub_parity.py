"""The same numbers as KerasHub's GPT-2 and Llama, from the same weights."""

import functools

import keras
import keras_hub
import numpy as np
import pytest

from attention import RotaryAttention
from blocks import CustomBackbone, GatedFeedForward
from tests.helpers import LLAMA3, assert_close, raises, to_numpy
from tests.models import (
    RAGGED,
    VOCABULARY_SIZE,
    make_lm,
    prompts,
    randomize,
    rows_of,
)

# KerasHub's names of the parts, and ours.
NAMES = {
    "/self_attention_layer_norm/": "/attention_norm/",
    "/self_attention_layernorm/": "/attention_norm/",
    "/feedforward_intermediate_dense/": "/ffn/intermediate/",
    "/feedforward_gate_dense/": "/ffn/gate/",
    "/feedforward_output_dense/": "/ffn/output/",
    "/feedforward_layer_norm/": "/ffn_norm/",
    "/feedforward_layernorm/": "/ffn_norm/",
    "sequence_output_layernorm": "layer_norm",
}


def our_path(path):
    for theirs, ours in NAMES.items():
        path = path.replace(theirs, ours)
    return path


def generate_both(models, x, **kwargs):
    """Returns the outputs of KerasHub's model and of ours."""
    options = {"stop_token_ids": None, **kwargs}
    inputs = [{key: value.copy() for key, value in x.items()} for _ in models]
    return [model.generate(i, **options) for model, i in zip(models, inputs)]


def compiled(cls, backbone, sampler="greedy", preprocessor=None):
    lm = cls(backbone, preprocessor)
    lm.compile(sampler=sampler)
    return lm


class LlamaLikeBackbone(CustomBackbone):
    scaling = None

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


class Llama3LikeBackbone(LlamaLikeBackbone):
    scaling = LLAMA3


GPT2 = (VOCABULARY_SIZE, 2, 4, 16, 32)
LLAMA = (VOCABULARY_SIZE, 2, 4, 32, 48, 2)
LLAMA_OPTIONS = {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-6}
SCALING = {
    "rope_frequency_adjustment_factor": LLAMA3["factor"],
    "rope_low_freq_factor": LLAMA3["low_freq_factor"],
    "rope_high_freq_factor": LLAMA3["high_freq_factor"],
    "rope_pretraining_sequence_length": LLAMA3["original_max_position_embeddings"],
}


@functools.cache
def make_models(name):
    """KerasHub's model and ours, of the same weights."""
    hub = keras_hub.models
    if name == "gpt2":
        reference = hub.GPT2Backbone(*GPT2, dropout=0.0, max_sequence_length=64)
        backbone = CustomBackbone(*GPT2, max_sequence_length=64)
    else:
        scaling, cls = {
            "llama": ({}, LlamaLikeBackbone),
            "llama3": (SCALING, Llama3LikeBackbone),
        }[name]
        reference = hub.LlamaBackbone(*LLAMA, **LLAMA_OPTIONS, **scaling)
        backbone = cls(*LLAMA, learned_positions=False, **LLAMA_OPTIONS)
    randomize(reference)
    ours = {w.path: w for w in backbone.weights}
    # All weights, by name.
    assert {our_path(w.path) for w in reference.weights} == set(ours)
    for weight in reference.weights:
        ours[our_path(weight.path)].assign(weight)
    lm_class = hub.GPT2CausalLM if name == "gpt2" else hub.LlamaCausalLM
    return compiled(lm_class, reference), make_lm(backbone)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3"])
def test_hidden_states_and_logits_are_equal(name):
    reference_lm, lm = make_models(name)
    rng = np.random.default_rng(0)
    x = prompts([rng.integers(0, VOCABULARY_SIZE, size=n) for n in (40, 7, 23)])
    real = x["padding_mask"].astype(bool)
    for theirs, ours in ((reference_lm.backbone, lm.backbone), (reference_lm, lm)):
        expected, outputs = to_numpy(theirs(x)), to_numpy(ours(x))
        assert expected.shape == outputs.shape
        assert np.abs(expected[real]).max() > 0.5
        assert_close(outputs[real], expected[real], atol=1e-4)
    assert CustomBackbone(VOCABULARY_SIZE, 1, 2, 8, 16).max_sequence_length == 1024
    assert isinstance(lm.backbone, keras_hub.models.Backbone)
    assert isinstance(lm, keras_hub.models.CausalLM)


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_greedy_tokens_are_equal(name):
    models, x = make_models(name), prompts(RAGGED, width=20)
    expected, outputs = generate_both(models, x)
    assert set(outputs) == set(expected)
    for key in expected:
        assert outputs[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(outputs[key], expected[key])
    # Not one token again and again, which would show little.
    free = outputs["token_ids"]
    assert len(np.unique(free[0, 3:])) > 3
    # Rows that stopped are masked as in KerasHub.
    stops = [int(free[0, 6]), int(free[1, 9])]
    expected, outputs = generate_both(models, x, stop_token_ids=stops)
    np.testing.assert_array_equal(outputs["padding_mask"], expected["padding_mask"])
    assert rows_of(outputs) == rows_of(expected)


@pytest.mark.slow_on_jax
def test_contrastive_search_is_keras_hubs():
    sampler = keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.3)
    models = [compiled(type(x), x.backbone, sampler) for x in make_models("gpt2")]
    expected, outputs = generate_both(models, prompts(RAGGED[1:2], width=16))
    assert outputs["token_ids"].tolist() == expected["token_ids"].tolist()


def test_texts_are_equal_with_keras_hubs_preprocessor():
    letters = [chr(ord(first) + i) for first in "aA" for i in range(26)]
    vocabulary = [*letters, "Ġ", "th", "he", "Ġt", ".", ",", "!", "<|endoftext|>"]
    assert len(vocabulary) == VOCABULARY_SIZE
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["t h", "h e", "Ġ t"],
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=20
    )
    reference_lm, lm = (
        compiled(type(x), x.backbone, preprocessor=preprocessor)
        for x in make_models("gpt2")
    )
    texts = ["the", "to be,", "a"]
    for strip_prompt in (False, True):
        expected = reference_lm.generate(texts, strip_prompt=strip_prompt)
        outputs = lm.generate(texts, strip_prompt=strip_prompt)
        assert outputs == expected
        assert isinstance(outputs, list)
        assert len(set(outputs)) == 3
        assert lm.generate(texts[1], strip_prompt=strip_prompt) == expected[1]
        assert len(expected[1]) > 6
    # Where KerasHub cuts a prompt, we raise.
    text = "abcdefghijklmnopqrstuvwxyz"
    assert len(reference_lm.generate([text])[0]) < len(text)
    with raises(ValueError, "Prompt 0 has"):
        lm.generate([text])
