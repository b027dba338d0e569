"""`CausalLM.generate` against loops over the same model without a cache."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from tests.helpers import raises, slow
from tests.models import (
    RAGGED,
    VARIANTS,
    VOCABULARY_SIZE,
    brute_force_greedy,
    byte_preprocessor,
    check_generation,
    make_backbone,
    make_small_lm,
    make_variant,
    prompts,
    rows_of,
)


@pytest.fixture(scope="module")
def lm():
    return make_small_lm(make_backbone(num_layers=1))


@pytest.fixture(scope="module")
def text_lm():
    backbone = make_backbone(num_layers=1, vocabulary_size=256)
    return make_small_lm(backbone, byte_preprocessor())


@pytest.fixture(scope="module")
def expected(lm):
    """The greedy continuation of the ragged prompts to 20 tokens."""
    return brute_force_greedy(lm, RAGGED, [20] * 3)


# === Greedy, against brute force ===


@pytest.mark.xla
@pytest.mark.parametrize(
    "variant", [x if x in ("gqa", "rotary", "t5") else slow(x) for x in VARIANTS]
)
def test_every_variant_equals_brute_force(variant):
    lm = make_small_lm(make_variant(variant))
    check_generation(lm, 13)


def test_rows_of_any_lengths_equal_brute_force(lm, expected):
    # Through two capacities of the cache, and each row alone.
    rows, options = prompts(RAGGED), {"stop_token_ids": None, "max_length": 20}
    assert rows_of(lm.generate(rows, **options)) == expected
    for row in range(3):
        alone = lm.generate(prompts([RAGGED[row]], width=7), **options)
        assert rows_of(alone) == [expected[row]]
    # The contents of padded places play no role, and are left alone.
    rows["token_ids"] = np.where(rows["padding_mask"], rows["token_ids"], -100)
    assert rows_of(lm.generate(rows, **options)) == expected
    assert rows["token_ids"].min() == -100
    same = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    outputs = lm.generate(prompts(same), stop_token_ids=None, max_length=13)
    assert rows_of(outputs) == brute_force_greedy(lm, same, [13] * 3)
    # 33 tokens are padded to 64, which are all the positions there are.
    row = np.random.default_rng(0).integers(0, VOCABULARY_SIZE, 33).tolist()
    outputs = lm.generate(prompts([row]), stop_token_ids=None, max_length=38)
    assert rows_of(outputs) == brute_force_greedy(lm, [row], [38], width=64)


# === Lengths ===


@pytest.mark.parametrize(
    ("limits", "width", "lengths"),
    [
        ({"max_new_tokens": 6}, 7, [9, 13, 7]),
        ({"max_length": 9, "max_new_tokens": 6}, 7, [9, 9, 7]),
        # Room in the arrays is the default length.
        ({}, 20, [20, 20, 20]),
    ],
)
def test_each_row_has_its_limit(lm, expected, limits, width, lengths):
    outputs = lm.generate(prompts(RAGGED, width), stop_token_ids=None, **limits)
    assert rows_of(outputs) == [row[:n] for row, n in zip(expected, lengths)]
    assert outputs["token_ids"].shape == (3, max(lengths))


def test_a_prompt_without_room_is_returned_as_it_is(lm, expected):
    outputs = lm.generate(prompts(RAGGED), stop_token_ids=None)
    assert rows_of(outputs) == [row[:7] for row in expected]
    full = prompts([RAGGED[1]])
    for sampler in ("greedy", "beam"):
        other = make_small_lm(lm.backbone, sampler=sampler)
        outputs = other.generate(full, stop_token_ids=None, max_length=7)
        np.testing.assert_array_equal(outputs["token_ids"], full["token_ids"])
    # Without a length, that is not what was meant.
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
        end = next(
            (i + 1 for i, t in enumerate(row) if i >= len(prompt) and t in stops), 20
        )
        wanted.append(row[:end])
    assert len({len(row) for row in wanted}) > 1
    assert rows_of(outputs) == wanted
    assert (outputs["token_ids"][~outputs["padding_mask"].astype(bool)] == 0).all()


def test_a_stop_token_in_the_prompt_does_not_stop(lm, expected):
    stop = RAGGED[1][2]
    assert stop not in expected[1][7:]
    x = prompts([RAGGED[1]])
    outputs = lm.generate(x, stop_token_ids=stop, max_length=20)
    assert rows_of(outputs) == [expected[1]]


def test_auto_is_the_end_token_of_the_preprocessor(text_lm, monkeypatch):
    x = prompts([[97, 98, 99], [100], [101, 102]])
    free = rows_of(text_lm.generate(x, stop_token_ids=None, max_length=16))
    end = free[0][6]
    monkeypatch.setattr(text_lm, "preprocessor", byte_preprocessor(end_token=end))
    rows = rows_of(text_lm.generate(x, max_length=16))
    assert rows[0] == free[0][: free[0].index(end, 3) + 1]
    assert end not in rows[0][3:-1]
    monkeypatch.setattr(text_lm, "preprocessor", byte_preprocessor(end_token=None))
    with pytest.warns(UserWarning, match="no end token"):
        assert rows_of(text_lm.generate(x, max_length=16)) == free


# === Forms of inputs and outputs ===


def decode(tokens):
    kept = [t for t in tokens if t != 1]
    return bytes(kept).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def text_rows(text_lm):
    rows = [list(b"abc"), list(b"defghij"), list(b"z")]
    rows = brute_force_greedy(text_lm, rows, [16] * 3, width=16)
    ended = []
    for row in rows:
        ended.append(row[: row.index(1) + 1] if 1 in row else row)
    return ended


TEXTS = ["abc", "defghij", "z"]


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
    x = prompts([list(text.encode()) for text in TEXTS])
    assert rows_of(text_lm.generate(x, max_length=16)) == text_rows


def test_datasets_of_tokens(lm, expected):
    dataset = tf.data.Dataset.from_tensor_slices(prompts(RAGGED)).batch(3)
    outputs = lm.generate(dataset, stop_token_ids=None, max_length=20)
    assert rows_of(outputs) == expected
    # Batches of different widths are padded to the widest.
    outputs = lm.generate(
        tf.data.Dataset.from_tensor_slices(prompts(RAGGED)).batch(1),
        stop_token_ids=None,
        max_new_tokens=13,
    )
    wanted = [row[: len(p) + 13] for row, p in zip(expected, RAGGED)]
    assert outputs["token_ids"].shape == (3, 20)
    assert rows_of(outputs) == wanted


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
    outputs = lm.generate(
        prompts(RAGGED), stop_token_ids=None, strip_prompt=True, max_length=20
    )
    assert rows_of(outputs) == [row[len(p) :] for row, p in zip(expected, RAGGED)]


def test_texts_that_grow_when_tokenized_are_not_cut():
    @keras.saving.register_keras_serializable(package="tests")
    class Doubling(keras_hub.tokenizers.ByteTokenizer):
        def tokenize(self, inputs):
            return super().tokenize(tf.strings.join([inputs] * 3))

    lm = make_small_lm(
        make_backbone(num_layers=1, vocabulary_size=256),
        byte_preprocessor(),
    )
    lm.preprocessor = type(lm.preprocessor)(Doubling(), sequence_length=16, end_token=1)
    outputs = lm.generate("abcdefghij", max_new_tokens=2, stop_token_ids=None)
    assert outputs.startswith("abcdefghij" * 3)


# === Compiling ===


class CountingDense(keras.layers.Dense):
    calls = 0

    def call(self, *args, **kwargs):
        type(self).calls += 1
        return super().call(*args, **kwargs)


@pytest.mark.skipif(keras.config.backend() == "torch", reason="torch compiles nothing")
def test_nothing_is_compiled_twice():
    from blocks import CustomBackbone

    class CountingBackbone(CustomBackbone):
        def create_ffn(self, inputs_shape, layer_index):
            return CountingDense(inputs_shape[-1])

    lm = make_small_lm(make_backbone(CountingBackbone, num_layers=1))

    def generate(rows, **kwargs):
        before = CountingDense.calls
        lm.generate(prompts(rows), stop_token_ids=None, **kwargs)
        return CountingDense.calls - before

    assert generate(RAGGED, max_length=20) > 0
    assert generate(RAGGED, max_length=20) == 0
    # Other lengths of the same buckets, other prompts, other limits.
    other = [[1, 2, 3, 4, 5, 6], [7, 8], [9]]
    assert generate(other, max_length=18) == 0
    assert generate(other, max_new_tokens=12) == 0
    before = CountingDense.calls
    lm.generate(prompts(other), stop_token_ids=(3, 4), max_length=18)
    lm.generate(prompts(other), stop_token_ids=(5, 6, 7), max_length=18)
    assert CountingDense.calls == before
