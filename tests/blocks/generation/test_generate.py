"""`CausalLM.generate` against loops over the same model without a cache."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from blocks import CausalLMPreprocessor
from blocks.generation.engine import Engine
from tests.helpers import raises, slow
from tests.models import (
    RAGGED,
    VOCABULARY_SIZE,
    brute_force_greedy,
    byte_preprocessor,
    check_generation,
    generated,
    make_backbone,
    make_small_lm,
    make_text_lm,
    make_variant,
    prompts,
    rows_of,
)


@pytest.fixture(scope="module")
def expected(lm):
    """The greedy continuation of the ragged prompts to 20 tokens."""
    return brute_force_greedy(lm, RAGGED, 20)


# === Greedy, against brute force ===


@pytest.mark.xla
@pytest.mark.parametrize(
    "variant",
    ["rotary", *map(slow, ("mha", "mqa", "gqa", "t5", "alibi", "leak"))],
)
def test_every_variant_equals_brute_force(variant):
    check_generation(make_small_lm(make_variant(variant)), max_length=13)


def test_rows_of_any_lengths_equal_brute_force(lm, expected):
    # Through two capacities of the cache, and each row alone.
    assert generated(lm, max_length=20) == expected
    for tokens, wanted in zip(RAGGED, expected):
        alone = prompts([tokens], width=7)
        outputs = lm.generate(alone, stop_token_ids=None, max_length=20)
        assert rows_of(outputs) == [wanted]
    # The contents of padded places play no role, and are left alone.
    rows = prompts(RAGGED)
    rows["token_ids"] = np.where(rows["padding_mask"], rows["token_ids"], -100)
    outputs = lm.generate(rows, stop_token_ids=None, max_length=20)
    assert rows_of(outputs) == expected
    assert rows["token_ids"].min() == -100
    check_generation(lm, [[1, 2, 3], [4, 5, 6], [7, 8, 9]], max_length=13)
    # 33 tokens are padded to 64, which are all the positions there are.
    row = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, 33)
    check_generation(lm, [row.tolist()], max_length=38)


# === Lengths ===


@pytest.mark.parametrize(
    ("limits", "width", "lengths"),
    [
        ({"max_new_tokens": 6}, 7, [9, 13, 7]),
        ({"max_length": 9, "max_new_tokens": 6}, 7, [9, 9, 7]),
        # Room in the arrays is the default length.
        ({}, 20, [20, 20, 20]),
        # A prompt without room is returned as it is.
        ({}, 7, [7, 7, 7]),
    ],
)
def test_each_row_has_its_limit(lm, expected, limits, width, lengths):
    outputs = lm.generate(prompts(RAGGED, width), stop_token_ids=None, **limits)
    assert rows_of(outputs) == [row[:n] for row, n in zip(expected, lengths)]
    assert outputs["token_ids"].shape == (3, max(lengths))


def test_a_prompt_without_room_is_returned_as_it_is(lm):
    for sampler in ("greedy", "beam"):
        other = make_small_lm(lm.backbone, sampler=sampler)
        assert generated(other, RAGGED[1:2], max_length=7) == RAGGED[1:2]
    # Without a length, that is not what was meant.
    full = prompts(RAGGED[1:2])
    for inputs in (full, full["token_ids"], RAGGED, RAGGED[0]):
        with raises(ValueError, "pass `max_new_tokens`, or `max_length`"):
            lm.generate(inputs, stop_token_ids=None)


# === Stop tokens ===


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_rows_end_with_their_first_new_stop_token(lm, expected, kind):
    stops = [expected[0][9], expected[2][4]]
    outputs = lm.generate(prompts(RAGGED), stop_token_ids=kind(stops), max_length=20)
    wanted = []
    for row, prompt in zip(expected, RAGGED):
        ends = (i + 1 for i in range(len(prompt), 20) if row[i] in stops)
        wanted.append(row[: next(ends, 20)])
    assert len({len(row) for row in wanted}) > 1
    assert rows_of(outputs) == wanted
    assert (outputs["token_ids"][~outputs["padding_mask"].astype(bool)] == 0).all()


def test_a_stop_token_in_the_prompt_does_not_stop(lm, expected):
    stop = RAGGED[1][2]
    assert stop not in expected[1][7:]
    found = generated(lm, RAGGED[1:2], stop_token_ids=stop, max_length=20)
    assert found == expected[1:2]


def test_auto_is_the_end_token_of_the_preprocessor(text_lm, monkeypatch):
    x = [[97, 98, 99], [100], [101, 102]]
    free = generated(text_lm, x, max_length=16)
    end = free[0][6]
    monkeypatch.setattr(text_lm, "preprocessor", byte_preprocessor(end_token=end))
    rows = generated(text_lm, x, stop_token_ids="auto", max_length=16)
    assert rows[0] == free[0][: free[0].index(end, 3) + 1]
    assert end not in rows[0][3:-1]
    monkeypatch.setattr(text_lm, "preprocessor", byte_preprocessor(end_token=None))
    with pytest.warns(UserWarning, match="no end token"):
        assert rows_of(text_lm.generate(prompts(x), max_length=16)) == free


# === Forms of inputs and outputs ===

TEXTS = ["abc", "defghij", "z"]


def decode(tokens):
    kept = [t for t in tokens if t != 1]
    return bytes(kept).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def text_rows(text_lm):
    rows = brute_force_greedy(text_lm, [list(text.encode()) for text in TEXTS], 16)
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


@pytest.mark.slow
def test_texts_in_texts_out(text_lm, text_rows):
    wanted = [decode(row) for row in text_rows]
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS)
    for inputs in (
        TEXTS,
        tuple(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        tf.constant(TEXTS),
        dataset,
        dataset.batch(2),
        dataset.batch(3),
        (text for text in TEXTS),
        tf.RaggedTensor.from_row_splits(TEXTS, [0, 3])[0],
    ):
        outputs = text_lm.generate(inputs)
        assert isinstance(outputs, list)
        assert outputs == wanted
    for inputs in ("abc", np.array("abc"), tf.constant("abc")):
        assert text_lm.generate(inputs) == wanted[0]
    assert text_lm.generate(["abc"]) == wanted[:1]
    x = [list(text.encode()) for text in TEXTS]
    assert generated(text_lm, x, stop_token_ids="auto", max_length=16) == text_rows


def test_datasets_of_tokens(lm, expected):
    # Batches of different widths are padded to the widest.
    outputs = lm.generate(
        tf.data.Dataset.from_tensor_slices(prompts(RAGGED)).batch(1),
        stop_token_ids=None,
        max_new_tokens=13,
    )
    assert outputs["token_ids"].shape == (3, 20)
    assert rows_of(outputs) == [row[: len(p) + 13] for row, p in zip(expected, RAGGED)]


@pytest.mark.parametrize("row", [None, 1])
def test_tokens_in_every_form(lm, expected, row):
    x, rows = prompts(RAGGED), RAGGED
    if row is not None:
        x, rows = {key: value[row] for key, value in x.items()}, RAGGED[row]
    forms = [
        x,
        rows,
        {"token_ids": rows, "padding_mask": keras.tree.map_structure(np.sign, rows)},
        {"token_ids": rows},
    ]
    if row is None:
        convert = ops.convert_to_tensor
        forms += [
            {key: convert(value) for key, value in x.items()},
            {key: value.tolist() for key, value in x.items()},
            tuple(np.array(tokens, "uint8") for tokens in rows),
            [convert(tokens) for tokens in rows],
            (tokens for tokens in rows),
            tf.ragged.constant(rows),
            tf.data.Dataset.from_tensors(tf.ragged.constant(rows)),
            tf.data.Dataset.from_tensor_slices(x).batch(3),
        ]
    else:
        forms += [np.array(rows), ops.convert_to_tensor(rows), tf.constant(rows)]
    for inputs in forms:
        outputs = lm.generate(inputs, stop_token_ids=None, max_length=20)
        assert isinstance(outputs["token_ids"], np.ndarray)
        if row is None:
            assert rows_of(outputs) == expected
        else:
            assert outputs["token_ids"].tolist() == expected[row]
            assert outputs["padding_mask"].shape == (20,)


def test_strip_prompt(text_lm, text_rows, lm, expected):
    stripped = text_lm.generate(TEXTS, strip_prompt=True)
    pairs = zip(text_rows, TEXTS)
    assert stripped == [decode(row[len(text) :]) for row, text in pairs]
    found = generated(lm, strip_prompt=True, max_length=20)
    assert found == [row[len(p) :] for row, p in zip(expected, RAGGED)]


def test_texts_that_grow_when_tokenized_are_not_cut():
    @keras.saving.register_keras_serializable(package="tests")
    class Doubling(keras_hub.tokenizers.ByteTokenizer):
        def tokenize(self, inputs):
            return super().tokenize(tf.strings.join([inputs] * 3))

    lm = make_text_lm()
    lm.preprocessor = CausalLMPreprocessor(Doubling(), sequence_length=16, end_token=1)
    outputs = lm.generate("abcdefghij", max_new_tokens=2, stop_token_ids=None)
    assert outputs.startswith("abcdefghij" * 3)


@pytest.mark.skipif(keras.config.backend() == "torch", reason="torch compiles nothing")
def test_nothing_is_compiled_twice(calls_of):
    lm = make_small_lm(make_backbone(num_layers=1))
    traced = calls_of(Engine, "hidden_states")
    generated(lm, max_length=20)
    assert traced
    traced.clear()
    generated(lm, max_length=20)
    # Other lengths of the same buckets, other prompts, limits and stop tokens.
    other = [[1, 2, 3, 4, 5, 6], [7, 8], [9]]
    for options in ({}, {"stop_token_ids": (3, 4)}, {"stop_token_ids": (5, 6, 7)}):
        generated(lm, other, max_length=18, **options)
    generated(lm, other, max_new_tokens=12)
    assert not traced
