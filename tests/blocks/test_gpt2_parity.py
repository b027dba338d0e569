"""The default backbone is GPT-2: the same numbers as KerasHub's, from the same weights."""

import keras_hub
import numpy as np
import pytest

from blocks import CausalLM, CustomBackbone
from tests.models import (
    RAGGED,
    VOCABULARY_SIZE,
    brute_force_greedy,
    make_backbone,
    make_lm,
    prompts,
    randomize,
    rows_of,
    to_numpy,
)

# KerasHub's names of the parts of a block, and ours.
NAMES = {
    "self_attention_layer_norm": "attention_norm",
    "feedforward_intermediate_dense": "ffn/intermediate",
    "feedforward_output_dense": "ffn/output",
    "feedforward_layer_norm": "ffn_norm",
}


def our_path(path: str) -> str:
    for theirs, ours in NAMES.items():
        path = path.replace(f"/{theirs}/", f"/{ours}/")
    return path


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
    randomize(reference)
    backbone = make_backbone()
    ours = {w.path: w for w in backbone.weights}
    assert {our_path(w.path) for w in reference.weights} == set(ours)
    for weight in reference.weights:
        ours[our_path(weight.path)].assign(weight)
    reference_lm = keras_hub.models.GPT2CausalLM(reference)
    reference_lm.compile(sampler="greedy")
    return reference_lm, make_lm(backbone)


def test_hidden_states_and_logits_are_equal(models):
    reference_lm, lm = models
    x = prompts(RAGGED)
    real = x["padding_mask"].astype(bool)
    for theirs, ours in (
        (reference_lm.backbone, lm.backbone),
        (reference_lm, lm),
    ):
        expected, outputs = to_numpy(theirs(x)), to_numpy(ours(x))
        assert expected.shape == outputs.shape
        assert np.abs(expected[real]).max() > 0.5
        np.testing.assert_allclose(outputs[real], expected[real], atol=1e-4)


def test_greedy_tokens_are_equal(models):
    reference_lm, lm = models
    x = prompts(RAGGED, width=20)
    expected = reference_lm.generate(
        {k: v.copy() for k, v in x.items()}, stop_token_ids=None
    )
    outputs = lm.generate(x, stop_token_ids=None)
    assert set(outputs) == set(expected)
    for key in expected:
        assert outputs[key].dtype == expected[key].dtype
    np.testing.assert_array_equal(outputs["token_ids"], expected["token_ids"])
    np.testing.assert_array_equal(outputs["padding_mask"], expected["padding_mask"])
    # Not one token again and again, which would show little.
    assert len(np.unique(outputs["token_ids"][0, 3:])) > 3


def test_greedy_tokens_of_a_single_prompt_are_equal(models):
    reference_lm, lm = models
    x = prompts(RAGGED[1:2], width=20)
    expected = reference_lm.generate(
        {k: v.copy() for k, v in x.items()}, stop_token_ids=None
    )
    outputs = lm.generate(x, stop_token_ids=None)
    np.testing.assert_array_equal(outputs["token_ids"], expected["token_ids"])


def test_stopped_rows_are_masked_as_in_keras_hub(models):
    reference_lm, lm = models
    x = prompts(RAGGED, width=20)
    free = lm.generate(x, stop_token_ids=None)["token_ids"]
    stops = [int(free[0, 6]), int(free[1, 9])]
    expected = reference_lm.generate(
        {k: v.copy() for k, v in x.items()}, stop_token_ids=stops
    )
    outputs = lm.generate(x, stop_token_ids=stops)
    np.testing.assert_array_equal(outputs["padding_mask"], expected["padding_mask"])
    assert rows_of(outputs) == rows_of(expected)


def test_contrastive_search_is_keras_hubs(models):
    reference_lm, lm = models
    tokens = []
    for model in (reference_lm, lm):
        sampler = keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.3)
        other = type(model)(model.backbone)
        other.compile(sampler=sampler)
        outputs = other.generate(prompts(RAGGED[1:2], width=16), stop_token_ids=None)
        tokens.append(outputs["token_ids"].tolist())
    assert tokens[0] == tokens[1]


# === Text, with KerasHub's own tokenizer and preprocessor ===


@pytest.fixture(scope="module")
def text_models(models):
    letters = [chr(ord("a") + i) for i in range(26)] + [
        chr(ord("A") + i) for i in range(26)
    ]
    vocabulary = [*letters, "Ġ", "th", "he", "Ġt", ".", ",", "!", "<|endoftext|>"]
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["t h", "h e", "Ġ t"],
    )
    assert len(vocabulary) == VOCABULARY_SIZE
    made = []
    for model in models:
        preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
            tokenizer, sequence_length=20
        )
        other = type(model)(model.backbone, preprocessor)
        other.compile(sampler="greedy")
        made.append(other)
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


def test_where_keras_hub_cuts_a_prompt_we_say_so(text_models):
    reference_lm, lm = text_models
    text = "abcdefghijklmnopqrstuvwxyz"
    assert len(reference_lm.generate([text])[0]) < len(text)
    with pytest.raises(ValueError, match="Prompt 0 has"):
        lm.generate([text])


def test_untied_embeddings():
    lm = make_lm(make_backbone(tie_word_embeddings=False))
    names = [w.path for w in lm.weights if "token_embedding" in w.path]
    assert len(names) == 2
    outputs = lm.generate(prompts(RAGGED, width=20), stop_token_ids=None)
    assert rows_of(outputs) == brute_force_greedy(lm, RAGGED, [20] * 3)


def test_default_arguments_are_gpt2s():
    backbone = CustomBackbone(VOCABULARY_SIZE, 1, 2, 8, 16)
    assert backbone.max_sequence_length == 1024
    assert isinstance(backbone, keras_hub.models.Backbone)
    assert isinstance(CausalLM(backbone), keras_hub.models.CausalLM)
    assert set(backbone.input) == {"token_ids", "padding_mask"}
