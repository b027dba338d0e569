"""Settings of samplers, several continuations of a prompt, and nothing stale."""

import logging

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from blocks import PromptLookup
from blocks.generation import engine, mixin
from tests.helpers import raises, slow
from tests.models import (
    RAGGED,
    brute_force_greedy,
    byte_preprocessor,
    generated,
    make_backbone,
    make_small_lm,
    make_text_lm,
    prompts,
    rows_of,
)

OPTIONS = {"stop_token_ids": None, "max_new_tokens": 6}


@pytest.fixture
def lm():
    return make_small_lm(make_backbone(num_layers=1))


def generate(lm, rows=RAGGED, **kwargs):
    return generated(lm, rows, **{**OPTIONS, **kwargs})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(
            "RandomSampler",
            [{"temperature": 0.01}, {"temperature": 30.0}],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "TopKSampler",
            [{"temperature": 0.01}, {"temperature": 30.0}],
            marks=pytest.mark.slow,
        ),
        ("TopPSampler", [{"p": 1e-6}, {"p": 0.999, "temperature": 30.0}]),
    ],
)
def test_settings_count_without_compiling_again(lm, name, settings):
    greedy = generate(lm)
    sampler = getattr(keras_hub.samplers, name)(seed=1)
    lm.compile(sampler=sampler)
    found = []
    for values in settings:
        for key, value in values.items():
            setattr(sampler, key, value)
        before = lm.compilations
        found.append([generate(lm) for _ in range(3)])
        # The user's settings are still there.
        assert all(getattr(sampler, k) == v for k, v in values.items())
    assert found[0] == [greedy] * 3
    assert found[1][0] != found[1][1] and greedy not in found[1]
    assert lm.compilations == before


def test_several_continuations_share_the_prefill(lm, calls_of):
    lm.compile(sampler=keras_hub.samplers.RandomSampler(seed=5))
    calls = calls_of(engine.Engine, "process")
    out = lm.generate(prompts(RAGGED), **OPTIONS, num_return_sequences=4)
    assert [len(tokens) for _, _, tokens, *_ in calls] == [3]
    assert out["token_ids"].shape == out["padding_mask"].shape == (3, 4, 13)
    for i, prompt in enumerate(RAGGED):
        continuations = rows_of({key: x[i] for key, x in out.items()})
        assert all(x[: len(prompt)] == prompt for x in continuations)
        assert all(len(x) == len(prompt) + 6 for x in continuations)
        assert len({tuple(x) for x in continuations}) > 1
    lm.compile(sampler="greedy")
    one = {key: x[1] for key, x in prompts(RAGGED).items()}
    out = lm.generate(one, **OPTIONS, num_return_sequences=2)
    assert rows_of(out) == brute_force_greedy(lm, RAGGED[1:2], 13) * 2
    with raises(ValueError, "`num_return_sequences`"):
        generate(lm, num_return_sequences=0)
    lm.compile(sampler="beam")
    with raises(ValueError, "`num_return_sequences`", "BeamSampler"):
        generate(lm, num_return_sequences=2)


def test_several_continuations_of_text():
    lm = make_text_lm(end_token=None)
    one = lm.generate("ab", num_return_sequences=2)
    assert one == [lm.generate("ab")] * 2
    several = lm.generate(["ab", "cd"], num_return_sequences=3)
    assert several == [[lm.generate(x)] * 3 for x in ("ab", "cd")]


def test_settings_that_can_not_be(lm):
    samplers = keras_hub.samplers
    above_0 = "larger than 0"
    for sampler, *words in (
        (samplers.RandomSampler(temperature=0.0), "`temperature`", above_0),
        (samplers.TopPSampler(p=0.0), "`p`", "TopPSampler", above_0),
        (samplers.TopKSampler(temperature=float("nan")), "`temperature`", above_0),
        (samplers.TopKSampler(k=1000), "`k`", "vocabulary", "k=1000"),
        (samplers.SpeculativeSampler(), "SpeculativeSampler", "speculation="),
    ):
        lm.compile(sampler=sampler)
        with raises(ValueError, *words):
            generate(lm)


# === Nothing stale, and nothing compiled without need ===


@pytest.mark.skipif(keras.config.backend() == "torch", reason="torch compiles nothing")
def test_what_was_compiled_and_why(lm, caplog):
    caplog.set_level(logging.INFO, logger="blocks.generation")
    assert lm.compiled_steps == ()

    def compiled(change=lambda: None, **kwargs):
        before = lm.compilations
        change()
        generate(lm, **kwargs)
        return [(x.step, x.reason) for x in lm.compiled_steps[before:]]

    def of(sampler):
        return lambda: lm.compile(sampler=sampler)

    def because(reason, *steps):
        return [(step, reason) for step in steps]

    steps = ("prefill", "sample", "decode")
    assert compiled(max_new_tokens=1) == because("first time", *steps[:2])
    first = lm.compiled_steps[0]
    assert (first.batch_size, first.capacity, first.chunk) == (3, 8, 3)
    found = compiled(max_new_tokens=1, rows=[[1, 2]])
    assert found == because("new shape", *steps[:2])
    found = compiled()
    assert found == [("prefill", "new shape"), ("decode", "first time")]
    assert caplog.text.count("Compiling") == lm.compilations == 6
    # An equal sampler, also another object, keeps what was compiled.
    assert compiled(of("greedy")) == []
    assert compiled(of(keras_hub.samplers.GreedySampler(temperature=2.0))) == []
    found = compiled(of(keras_hub.samplers.TopKSampler(seed=1)))
    assert found == because("another sampler", *steps[1:])
    # But for its seed, which counts.
    lm.compile(sampler=keras_hub.samplers.TopKSampler(seed=2))
    assert compiled(lambda: setattr(lm.sampler, "temperature", 5.0)) == []
    drawn = generate(lm)
    assert generate(lm) != drawn
    assert compiled(of(keras_hub.samplers.TopKSampler(temperature=5.0, seed=2))) == []
    assert generate(lm) == drawn
    found = compiled(lambda: setattr(lm.sampler, "k", 40))
    assert found == because("another sampler", *steps[1:])
    sampler = lm.sampler
    # Those before are kept.
    assert compiled(of("greedy")) == []
    assert compiled(lambda: lm.compile(sampler=sampler)) == []
    # The seed moves on, also in a step that is compiled for this sampler.
    drawn = [generate(lm, max_new_tokens=30) for _ in range(2)]
    assert drawn[0] != drawn[1]
    found = compiled(lambda: lm.backbone.enable_lora(2))
    assert found == because("weights replaced", *steps)
    # Deep inside of the model, where no variable changes.
    query = lm.backbone.transformer_layers[0].self_attention.query_dense
    found = compiled(lambda: setattr(query, "dtype_policy", "mixed_bfloat16"))
    assert found == because("dtype policy changed", *steps)
    lm.compile(sampler=lm.sampler, run_eagerly=True)
    assert compiled() == []
    assert [step for step, _ in compiled(of(lm.sampler))] == list(steps)


# === Tokens that can't be chosen ===


SEARCHES = ["beam", "contrastive"]


@pytest.mark.parametrize(
    "sampler", ["greedy", "top_k", *map(slow, ("top_p", *SEARCHES))]
)
def test_logits_that_are_nan_are_an_error(lm, sampler):
    lm.compile(sampler=sampler)
    (table,) = (w for w in lm.weights if tuple(w.shape) == (64, 16))
    values = keras.ops.convert_to_numpy(table).copy()
    # The prompts are read without: only what comes after position 9 is wrong.
    values[9] = np.nan
    table.assign(values)
    for speculation in [None] if sampler in SEARCHES else [None, PromptLookup()]:
        exact = sampler == "greedy" and speculation is None
        row = "After 10 tokens of row 1" if exact else "row"
        with raises(ValueError, "NaN or infinite", row, "`lm.get_weights()`"):
            generate(lm, max_new_tokens=9, speculation=speculation)


@pytest.mark.parametrize("sampler", ["random", "top_k", "top_p", *SEARCHES])
@pytest.mark.slow
def test_tokens_that_the_tokenizer_has_not_are_never_chosen(sampler):
    backbone = make_backbone(num_layers=1, vocabulary_size=300)
    # Without them, nearly all tokens would be among the last 44.
    embeddings = backbone.token_embedding.embeddings
    values = keras.ops.convert_to_numpy(embeddings).copy()
    values[256:] *= 30.0
    embeddings.assign(values)
    lm = make_small_lm(backbone, byte_preprocessor(end_token=None), sampler)
    for speculation in [None] if sampler in SEARCHES else [None, PromptLookup()]:
        rows = generate(lm, max_new_tokens=9, speculation=speculation)
        assert max(map(max, rows)) < 256
    assert isinstance(lm.generate("ab", **OPTIONS), str)
    free = generate(make_small_lm(backbone, sampler=sampler), max_new_tokens=9)
    assert max(map(max, free)) >= 256


# === Progress ===


@pytest.mark.parametrize(
    ("verbose", "watched", "slow", "shown"),
    [
        (1, False, False, True),
        (0, True, True, False),
        ("auto", True, True, True),
        ("auto", True, False, False),
        ("auto", False, True, False),
    ],
)
def test_progress(monkeypatch, capsys, verbose, watched, slow, shown):
    monkeypatch.setattr(mixin, "_is_watched", lambda: watched)
    seconds = 0.0 if slow else 1e9
    assert list(mixin.with_progress([1, 2, 3], verbose, seconds)) == [1, 2, 3]
    assert ("3/3" in capsys.readouterr().out) is shown


def test_progress_over_a_dataset(lm, capsys):
    data = tf.data.Dataset.from_tensor_slices(prompts(RAGGED)).batch(1)
    quiet = lm.generate(data, **OPTIONS)
    assert capsys.readouterr().out == ""
    shown = lm.generate(data, **OPTIONS, verbose=1)
    assert "3/3" in capsys.readouterr().out
    assert rows_of(quiet) == rows_of(shown)
    with raises(ValueError, "`verbose`", "loud"):
        lm.generate(data, **OPTIONS, verbose="loud")
