"""Settings of samplers, several continuations of a prompt, and nothing stale."""

import logging

import keras
import keras_hub
import numpy as np
import pytest

from blocks import PromptLookup
from blocks.generation import engine, mixin
from tests.helpers import raises
from tests.models import (
    RAGGED,
    brute_force_greedy,
    byte_preprocessor,
    make_backbone,
    make_small_lm,
    prompts,
    rows_of,
)


def generate(lm, rows=RAGGED, **kwargs):
    options = {"stop_token_ids": None, "max_new_tokens": 6, **kwargs}
    return lm.generate(prompts(rows), **options)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("RandomSampler", [{"temperature": 0.01}, {"temperature": 30.0}]),
        ("TopKSampler", [{"temperature": 0.01}, {"temperature": 30.0}]),
        ("TopPSampler", [{"p": 1e-6}, {"p": 0.999, "temperature": 30.0}]),
    ],
)
def test_settings_count_without_compiling_again(name, settings):
    lm = make_small_lm(make_backbone(num_layers=1))
    greedy = rows_of(generate(lm))
    sampler = getattr(keras_hub.samplers, name)(seed=1)
    lm.compile(sampler=sampler)
    found = []
    for values in settings:
        for key, value in values.items():
            setattr(sampler, key, value)
        before = lm.compilations
        found.append([rows_of(generate(lm)) for _ in range(3)])
        # The user's settings are still there.
        assert all(getattr(sampler, k) == v for k, v in values.items())
    assert found[0] == [greedy] * 3
    assert found[1][0] != found[1][1] and greedy not in found[1]
    assert lm.compilations == before


@pytest.mark.skipif(keras.config.backend() == "torch", reason="torch compiles nothing")
def test_other_changes_are_compiled_again():
    lm = make_small_lm(make_backbone(num_layers=1))
    sampler = keras_hub.samplers.TopKSampler(k=1, seed=1)
    lm.compile(sampler=sampler)
    greedy = rows_of(generate(lm))
    prefills = lm.compilations
    sampler.k, sampler.temperature = 50, 30.0
    assert rows_of(generate(lm)) != greedy
    # The sampling steps, but not the prefill.
    assert prefills < lm.compilations < 2 * prefills


def test_several_continuations_share_the_prefill(monkeypatch):
    backbone = make_backbone(num_layers=1)
    lm = make_small_lm(backbone, sampler=keras_hub.samplers.RandomSampler(seed=5))
    processed = []
    process = engine.Engine.process

    def spy(self, cache, capacity, tokens, *args):
        processed.append(len(tokens))
        return process(self, cache, capacity, tokens, *args)

    monkeypatch.setattr(engine.Engine, "process", spy)
    out = generate(lm, num_return_sequences=4)
    assert processed == [3]
    assert out["token_ids"].shape == out["padding_mask"].shape == (3, 4, 13)
    for i, prompt in enumerate(RAGGED):
        row = {key: x[i] for key, x in out.items()}
        continuations = rows_of(row)
        assert all(x[: len(prompt)] == prompt for x in continuations)
        assert all(len(x) == len(prompt) + 6 for x in continuations)
        assert len({tuple(x) for x in continuations}) > 1
    lm.compile(sampler="greedy")
    one = {key: x[1] for key, x in prompts(RAGGED).items()}
    options = {"stop_token_ids": None, "max_new_tokens": 6}
    out = lm.generate(one, **options, num_return_sequences=2)
    expected = brute_force_greedy(lm, [RAGGED[1]], [13])
    assert rows_of(out) == expected * 2
    with raises(ValueError, "`num_return_sequences`"):
        lm.generate(one, **options, num_return_sequences=0)
    lm.compile(sampler="beam")
    with raises(ValueError, "`num_return_sequences`", "BeamSampler"):
        lm.generate(one, **options, num_return_sequences=2)


def test_several_continuations_of_text():
    backbone = make_backbone(num_layers=1, vocabulary_size=256)
    lm = make_small_lm(backbone, byte_preprocessor(end_token=None))
    one = lm.generate("ab", num_return_sequences=2)
    assert one == [lm.generate("ab")] * 2
    several = lm.generate(["ab", "cd"], num_return_sequences=3)
    assert several == [[lm.generate(x)] * 3 for x in ("ab", "cd")]


def test_settings_that_can_not_be():
    lm = make_small_lm(make_backbone(num_layers=1))
    for sampler, name in (
        (keras_hub.samplers.RandomSampler(temperature=0.0), "temperature"),
        (keras_hub.samplers.TopPSampler(p=0.0), "p"),
        (keras_hub.samplers.TopKSampler(temperature=float("nan")), "temperature"),
    ):
        lm.compile(sampler=sampler)
        with raises(ValueError, f"`{name}`", type(sampler).__name__, "larger than 0"):
            generate(lm)
    lm.compile(sampler=keras_hub.samplers.TopKSampler(k=1000))
    with raises(ValueError, "`k`", "vocabulary", "k=1000"):
        generate(lm)
    lm.compile(sampler=keras_hub.samplers.SpeculativeSampler())
    with raises(ValueError, "SpeculativeSampler", "speculation="):
        generate(lm)


# === Nothing stale, and nothing compiled without need ===


@pytest.mark.skipif(keras.config.backend() == "torch", reason="torch compiles nothing")
def test_what_was_compiled_and_why(caplog):
    caplog.set_level(logging.INFO, logger="blocks.generation")
    lm = make_small_lm(make_backbone(num_layers=1))
    assert lm.compiled_steps == ()

    def compiled(change, **kwargs):
        before = lm.compilations
        change()
        generate(lm, **kwargs)
        return [(x.step, x.reason) for x in lm.compiled_steps[before:]]

    steps = ("prefill", "sample", "decode")
    found = compiled(lambda: None, max_new_tokens=1)
    assert found == [("prefill", "first time"), ("sample", "first time")]
    first = lm.compiled_steps[0]
    assert (first.batch_size, first.capacity, first.chunk) == (3, 8, 3)
    found = compiled(lambda: None, max_new_tokens=1, rows=[[1, 2]])
    assert found == [("prefill", "new shape"), ("sample", "new shape")]
    assert compiled(lambda: None) == [
        ("prefill", "new shape"),
        ("decode", "first time"),
    ]
    assert caplog.text.count("Compiling") == lm.compilations == 6
    # An equal sampler, also another object, keeps what was compiled.
    for sampler in ("greedy", keras_hub.samplers.GreedySampler(temperature=2.0)):
        assert compiled(lambda sampler=sampler: lm.compile(sampler=sampler)) == []
    found = compiled(lambda: lm.compile(sampler=keras_hub.samplers.TopKSampler(seed=1)))
    assert found == [(step, "another sampler") for step in steps[1:]]
    # But for its seed, which counts.
    lm.compile(sampler=keras_hub.samplers.TopKSampler(seed=2))
    assert compiled(lambda: setattr(lm.sampler, "temperature", 5.0)) == []
    drawn = rows_of(generate(lm))
    assert rows_of(generate(lm)) != drawn
    lm.compile(sampler=keras_hub.samplers.TopKSampler(temperature=5.0, seed=2))
    assert compiled(lambda: None) == []
    assert rows_of(generate(lm)) == drawn
    # The seed moves on, also in a step that is compiled for this sampler.
    drawn = [rows_of(generate(lm, max_new_tokens=30)) for _ in range(2)]
    assert drawn[0] != drawn[1]
    for change, reason in (
        (lambda: lm.backbone.enable_lora(2), "weights replaced"),
        (
            # Deep inside of the model, where no variable changes.
            lambda: setattr(
                lm.backbone.transformer_layers[0].self_attention.query_dense,
                "dtype_policy",
                "mixed_bfloat16",
            ),
            "dtype policy changed",
        ),
    ):
        assert compiled(change) == [(step, reason) for step in steps]
    lm.compile(sampler=lm.sampler, run_eagerly=True)
    assert compiled(lambda: None) == []
    found = compiled(lambda: lm.compile(sampler=lm.sampler))
    assert [step for step, _ in found] == list(steps)


# === Tokens that can't be chosen ===


@pytest.mark.parametrize("sampler", ["greedy", "top_k", "top_p", "beam", "contrastive"])
def test_logits_that_are_nan_are_an_error(sampler):
    lm = make_small_lm(make_backbone(num_layers=1), sampler=sampler)
    (table,) = (w for w in lm.weights if tuple(w.shape) == (64, 16))
    values = keras.ops.convert_to_numpy(table).copy()
    # The prompts are read without: only what comes after position 9 is wrong.
    values[9] = np.nan
    table.assign(values)
    searches = sampler in ("beam", "contrastive")
    for speculation in [None] if searches else [None, PromptLookup()]:
        exact = sampler == "greedy" and speculation is None
        row = "After 10 tokens of row 1" if exact else "row"
        with raises(ValueError, "NaN or infinite", row, "`lm.get_weights()`"):
            generate(lm, max_new_tokens=9, speculation=speculation)


@pytest.mark.parametrize("sampler", ["random", "top_k", "top_p", "beam", "contrastive"])
def test_tokens_that_the_tokenizer_has_not_are_never_chosen(sampler):
    backbone = make_backbone(num_layers=1, vocabulary_size=300)
    # Without them, nearly all tokens would be among the last 44.
    embeddings = backbone.token_embedding.embeddings
    values = keras.ops.convert_to_numpy(embeddings).copy()
    values[256:] *= 30.0
    embeddings.assign(values)
    preprocessor = byte_preprocessor(end_token=None)
    lm = make_small_lm(backbone, preprocessor, sampler=sampler)
    options = {"stop_token_ids": None, "max_new_tokens": 9}
    searches = sampler in ("beam", "contrastive")
    for speculation in [None] if searches else [None, PromptLookup()]:
        outputs = lm.generate(prompts(RAGGED), **options, speculation=speculation)
        assert outputs["token_ids"].max() < 256
    assert isinstance(lm.generate("ab", **options), str)
    free = make_small_lm(backbone, sampler=sampler).generate(prompts(RAGGED), **options)
    assert free["token_ids"].max() >= 256


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


def test_progress_over_a_dataset(capsys):
    import tensorflow as tf

    lm = make_small_lm(make_backbone(num_layers=1))
    data = tf.data.Dataset.from_tensor_slices(prompts(RAGGED)).batch(1)
    options = {"stop_token_ids": None, "max_new_tokens": 3}
    quiet = lm.generate(data, **options)
    assert capsys.readouterr().out == ""
    shown = lm.generate(data, **options, verbose=1)
    assert "3/3" in capsys.readouterr().out
    np.testing.assert_array_equal(quiet["token_ids"], shown["token_ids"])
    with raises(ValueError, "`verbose`", "loud"):
        lm.generate(data, **options, verbose="loud")
