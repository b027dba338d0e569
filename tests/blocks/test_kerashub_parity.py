"""The same numbers as KerasHub's GPT-2 and Llama, from the same weights."""

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
    check_generation,
    make_backbone,
    make_lm,
    prompts,
    randomize,
    rows_of,
    to_numpy,
)

# KerasHub's names of the parts, and ours.
GPT2_NAMES = {
    "/self_attention_layer_norm/": "/attention_norm/",
    "/feedforward_intermediate_dense/": "/ffn/intermediate/",
    "/feedforward_output_dense/": "/ffn/output/",
    "/feedforward_layer_norm/": "/ffn_norm/",
}
LLAMA_NAMES = {
    "/self_attention_layernorm/": "/attention_norm/",
    "/feedforward_intermediate_dense/": "/ffn/intermediate/",
    "/feedforward_gate_dense/": "/ffn/gate/",
    "/feedforward_output_dense/": "/ffn/output/",
    "/feedforward_layernorm/": "/ffn_norm/",
    "sequence_output_layernorm": "layer_norm",
}


def copy_weights(reference, backbone, names):
    """Gives the backbone the reference's weights: all, and by name."""

    def our_path(path):
        for theirs, ours in names.items():
            path = path.replace(theirs, ours)
        return path

    randomize(reference)
    ours = {w.path: w for w in backbone.weights}
    assert {our_path(w.path) for w in reference.weights} == set(ours)
    for weight in reference.weights:
        ours[our_path(weight.path)].assign(weight)


def generate_both(models, x, **kwargs):
    """Returns the outputs of KerasHub's model and of ours."""
    inputs = [{key: value.copy() for key, value in x.items()} for _ in models]
    return [model.generate(i, **kwargs) for model, i in zip(models, inputs)]


# === GPT-2 ===


@pytest.fixture(scope="module")
def models():
    reference = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY_SIZE,
        num_layers=2,
        num_heads=4,
        hidden_dim=16,
        intermediate_dim=32,
        dropout=0.0,
        max_sequence_length=64,
    )
    backbone = make_backbone()
    copy_weights(reference, backbone, GPT2_NAMES)
    reference_lm = keras_hub.models.GPT2CausalLM(reference)
    reference_lm.compile(sampler="greedy")
    return reference_lm, make_lm(backbone)


def test_hidden_states_and_logits_are_equal(models):
    reference_lm, lm = models
    x = prompts(RAGGED)
    real = x["padding_mask"].astype(bool)
    for theirs, ours in ((reference_lm.backbone, lm.backbone), (reference_lm, lm)):
        expected, outputs = to_numpy(theirs(x)), to_numpy(ours(x))
        assert expected.shape == outputs.shape
        assert np.abs(expected[real]).max() > 0.5
        np.testing.assert_allclose(outputs[real], expected[real], atol=1e-4)
    assert CustomBackbone(VOCABULARY_SIZE, 1, 2, 8, 16).max_sequence_length == 1024
    assert isinstance(lm.backbone, keras_hub.models.Backbone)
    assert isinstance(lm, keras_hub.models.CausalLM)


def test_greedy_tokens_are_equal(models):
    x = prompts(RAGGED, width=20)
    expected, outputs = generate_both(models, x, stop_token_ids=None)
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


def test_contrastive_search_is_keras_hubs(models):
    others = [type(model)(model.backbone) for model in models]
    for other in others:
        other.compile(sampler=keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.3))
    x = prompts(RAGGED[1:2], width=16)
    expected, outputs = generate_both(others, x, stop_token_ids=None)
    assert outputs["token_ids"].tolist() == expected["token_ids"].tolist()


@pytest.fixture(scope="module")
def text_models(models):
    """Both, with KerasHub's own tokenizer and preprocessor."""
    letters = [chr(ord(first) + i) for first in "aA" for i in range(26)]
    vocabulary = [*letters, "Ġ", "th", "he", "Ġt", ".", ",", "!", "<|endoftext|>"]
    assert len(vocabulary) == VOCABULARY_SIZE
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["t h", "h e", "Ġ t"],
    )
    made = []
    for model in models:
        preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
            tokenizer, sequence_length=20
        )
        made.append(type(model)(model.backbone, preprocessor))
        made[-1].compile(sampler="greedy")
    return made


@pytest.mark.parametrize("strip_prompt", [False, True])
def test_texts_are_equal(text_models, strip_prompt):
    reference_lm, lm = text_models
    texts = ["the", "to be,", "a"]
    expected = reference_lm.generate(texts, strip_prompt=strip_prompt)
    outputs = lm.generate(texts, strip_prompt=strip_prompt)
    assert outputs == expected
    assert isinstance(outputs, list)
    assert len(set(outputs)) == 3
    one = lm.generate("to be,", strip_prompt=strip_prompt)
    assert one == expected[1]
    assert len(one) > 6


def test_where_keras_hub_cuts_a_prompt_we_raise(text_models):
    reference_lm, lm = text_models
    text = "abcdefghijklmnopqrstuvwxyz"
    assert len(reference_lm.generate([text])[0]) < len(text)
    with pytest.raises(ValueError, match="Prompt 0 has"):
        lm.generate([text])


# === Llama: grouped rotary blocks ===


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


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_llamas(scaling=None, tie=False):
    sizes = {
        "vocabulary_size": VOCABULARY_SIZE,
        "num_layers": 2,
        "hidden_dim": 32,
        "intermediate_dim": 48,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tie,
        "layer_norm_epsilon": 1e-6,
    }
    llama3 = {}
    if scaling is not None:
        llama3 = {
            "rope_frequency_adjustment_factor": 8.0,
            "rope_low_freq_factor": 1.0,
            "rope_high_freq_factor": 4.0,
            "rope_pretraining_sequence_length": 16,
        }
    reference = keras_hub.models.LlamaBackbone(num_query_heads=4, **sizes, **llama3)
    backbone = LlamaLikeBackbone(
        num_heads=4, learned_positions=False, scaling=scaling, **sizes
    )
    copy_weights(reference, backbone, LLAMA_NAMES)
    return reference, backbone


def test_hidden_states_of_llama_are_equal():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCABULARY_SIZE, size=n).tolist() for n in (40, 7, 23)]
    x = prompts(rows)
    real = x["padding_mask"].astype(bool)
    found = []
    for scaling in (None, LLAMA3):
        reference, backbone = make_llamas(scaling)
        found.append(to_numpy(backbone(x)))
        expected = to_numpy(reference(x))
        np.testing.assert_allclose(found[-1][real], expected[real], atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_greedy_tokens_of_llama_are_equal():
    reference, backbone = make_llamas(LLAMA3, tie=True)
    reference_lm = keras_hub.models.LlamaCausalLM(reference, preprocessor=None)
    reference_lm.compile(sampler="greedy")
    both = (reference_lm, make_lm(backbone))
    x = prompts(RAGGED, width=20)
    expected, outputs = generate_both(both, x, stop_token_ids=None)
    assert rows_of(outputs) == rows_of(expected)


def test_untied_embeddings():
    lm = make_lm(make_backbone(tie_word_embeddings=False))
    assert len([w for w in lm.weights if "token_embedding" in w.path]) == 2
    check_generation(lm)
