"""The same numbers as KerasHub's models, from the same weights."""

import functools

import keras_hub
import numpy as np
import pytest

from blocks import CausalLM, CustomBackbone
from tests.helpers import LLAMA3, assert_close, raises, slow, to_numpy
from tests.models import (
    RAGGED,
    VOCABULARY_SIZE,
    prompts,
    randomize,
    rows_of,
)

pytestmark = pytest.mark.same_everywhere


def generate_both(models, x, **kwargs):
    """Returns the outputs of KerasHub's model and of ours."""
    options = {"stop_token_ids": None, **kwargs}
    inputs = [{key: value.copy() for key, value in x.items()} for _ in models]
    return [model.generate(i, **options) for model, i in zip(models, inputs)]


def compiled(cls, backbone, sampler="greedy", preprocessor=None):
    lm = cls(backbone, preprocessor)
    lm.compile(sampler=sampler)
    return lm


GPT2 = {
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "dropout": 0.0,
    "max_sequence_length": 64,
}
LLAMA = {
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
}
SCALING = {
    "rope_frequency_adjustment_factor": LLAMA3["factor"],
    "rope_low_freq_factor": LLAMA3["low_freq_factor"],
    "rope_high_freq_factor": LLAMA3["high_freq_factor"],
    "rope_pretraining_sequence_length": LLAMA3["original_max_position_embeddings"],
}
GEMMA = {**LLAMA, "head_dim": 10}
GEMMA2 = {
    **GEMMA,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
}
GEMMA3 = {**GEMMA2, "image_size": 8, "num_layers": 6}
SOFT_CAPS = {"attention_logit_soft_cap": 5.0, "final_logit_soft_cap": 3.0}
FALCON = {
    "num_layers": 2,
    "num_attention_heads": 6,
    "hidden_dim": 24,
    "intermediate_dim": 32,
}
# KerasHub's task, and arguments of its backbone.
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", LLAMA),
    "llama3": ("Llama3", {**LLAMA, **SCALING}),
    "llama3, tied": ("Llama3", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**LLAMA, "head_dim": 6, "sliding_window": 4}),
    "mistral, scaled": (
        "Mistral",
        {**LLAMA, "sliding_window": None, "rope_scaling_factor": 2.0},
    ),
    "qwen": ("Qwen", LLAMA),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 6, "sliding_window_size": None}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma", {**GEMMA2, **SOFT_CAPS}),
    "gemma3": ("Gemma3", {**GEMMA3, "global_rope_scaling_factor": 8.0}),
    "phi3": ("Phi3", LLAMA),
    "falcon": ("Falcon", FALCON),
}
EVERYWHERE = ("gpt2", "llama3")


def make_hub(name):
    model, arguments = MODELS[name]
    cls = getattr(keras_hub.models, f"{model}Backbone")
    backbone = cls(vocabulary_size=VOCABULARY_SIZE, **arguments)
    randomize(backbone)
    return backbone


@functools.cache
def make_backbones(name):
    """KerasHub's backbone and ours, of the same weights."""
    hub = make_hub(name)
    return hub, CausalLM.from_keras_hub(hub).backbone


@functools.cache
def make_models(name):
    task = getattr(keras_hub.models, f"{MODELS[name][0]}CausalLM")
    hub, backbone = make_backbones(name)
    return compiled(task, hub), compiled(CausalLM, backbone)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in EVERYWHERE else pytest.mark.slow)
        for name in MODELS
    ],
)
def test_hidden_states_and_logits_are_equal(name):
    backbones = make_backbones(name)
    rng = np.random.default_rng(0)
    x = prompts([rng.integers(0, VOCABULARY_SIZE, size=n) for n in (40, 7, 23)])
    real = x["padding_mask"].astype(bool)
    hidden = [model(x) for model in backbones]
    logits = [m.token_embedding(h, reverse=True) for m, h in zip(backbones, hidden)]
    for pair in (hidden, logits):
        expected, outputs = (to_numpy(array) for array in pair)
        assert expected.shape == outputs.shape
        assert np.abs(expected[real]).max() > 0.5
        assert_close(outputs[real], expected[real], atol=1e-4)


def test_classes_and_defaults_are_those_of_keras_hub():
    lm = make_models("gpt2")[1]
    assert isinstance(lm.backbone, keras_hub.models.Backbone)
    assert isinstance(lm, keras_hub.models.CausalLM)
    assert CustomBackbone(VOCABULARY_SIZE, 1, 2, 8, 16).max_sequence_length == 1024


@pytest.mark.parametrize("name", [slow("gpt2"), "llama3"])
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


@pytest.mark.slow
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
    backbone = make_models("gpt2")[0].backbone
    reference_lm = compiled(
        keras_hub.models.GPT2CausalLM, backbone, preprocessor=preprocessor
    )
    lm = CausalLM.from_keras_hub(reference_lm)
    lm.compile(sampler="greedy")
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


def test_weights_and_dtype_are_those_of_the_model_as_it_is_now():
    hub = make_hub("gpt2")
    hub.enable_lora(2)
    randomize(hub)
    x = prompts(RAGGED)
    real = x["padding_mask"].astype(bool)
    lm = CausalLM.from_keras_hub(hub)
    outputs, expected = (to_numpy(model(x))[real] for model in (lm.backbone, hub))
    assert_close(outputs, expected, atol=1e-4)
    lm = CausalLM.from_keras_hub(hub, dtype="bfloat16")
    assert {weight.dtype for weight in lm.trainable_weights} == {"bfloat16"}
    half = keras_hub.models.GPT2Backbone(9, 1, 1, 4, 4, dtype="float16")
    assert CausalLM.from_keras_hub(half).backbone.compute_dtype == "float16"


def test_what_is_not_read_is_an_error():
    hub = make_hub("gpt2")
    with raises(TypeError, "must be a task or backbone of KerasHub", "'LlamaBackbone'"):
        CausalLM.from_keras_hub(CausalLM.from_keras_hub(hub))
    hub.token_embedding.quantize("int8")
    with raises(ValueError, "are quantized", "'token_embedding'"):
        CausalLM.from_keras_hub(hub)


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (
            "Llama",
            {**LLAMA, "rope_position_scaling_factor": 2.0},
            "rope_position_scaling_factor=1.0 only",
        ),
        ("Gemma", {**GEMMA, "use_post_ffw_norm": True}, "use_post_ffw_norm=False only"),
        ("Gemma", {**GEMMA, "final_logit_soft_cap": 9.0}, "soft_cap=None only"),
        ("Gemma3", {**GEMMA, "image_size": 8}, "use_post_attention_norm=True only"),
    ],
)
def test_options_that_are_not_computed_are_an_error(model, arguments, message):
    cls = getattr(keras_hub.models, f"{model}Backbone")
    with raises(ValueError, message):
        CausalLM.from_keras_hub(cls(vocabulary_size=9, **arguments))
