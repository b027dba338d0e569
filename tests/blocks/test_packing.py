"""Documents packed into rows: what the rows hold, and that training sees no difference."""

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from attention import Retention, RotaryAttention
from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone, PackedDocuments
from tests.helpers import EAGER, assert_close, raises, to_numpy

TEXTS = ["ab", "cdefgh", "i", "jklmnopqrstuv", "wx"]


class Mixed(CustomBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        if layer_index:
            return Retention(2)
        return RotaryAttention(2, window=3)


def make_lm(length=8):
    keras.utils.set_random_seed(0)
    backbone = Mixed(256, 2, 2, 16, 32, max_sequence_length=length)
    preprocessor = CausalLMPreprocessor(
        keras_hub.tokenizers.ByteTokenizer(), length, start_token=2, end_token=1
    )
    lm = CausalLM(backbone, preprocessor)
    lm.compile(keras.optimizers.SGD(0.5), run_eagerly=EAGER)
    return lm


def documents_of(data):
    """Returns the documents of packed rows, with targets and weights."""
    found = []
    for x, y, weights in data:
        assert (x["padding_mask"] == (x["segment_ids"] > 0)).all()
        for row in range(len(y)):
            numbers = x["segment_ids"][row]
            assert (np.diff(numbers[numbers > 0]) >= 0).all()
            for number in range(1, numbers.max() + 1):
                here = numbers == number
                positions = x["positions"][row][here]
                np.testing.assert_array_equal(positions, np.arange(here.sum()))
                found.append(
                    (x["token_ids"][row][here], y[row][here], weights[row][here])
                )
            assert not weights[row][numbers == 0].any()
    return found


def test_nothing_is_lost():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 99, rng.integers(1, 9)).tolist() for _ in range(200)]
    data = PackedDocuments(documents, sequence_length=16, batch_size=4, open_rows=8)
    found = documents_of(data)
    wanted = sorted((x[:-1], x[1:]) for x in documents if len(x) > 1)
    assert sorted((x.tolist(), y.tolist()) for x, y, _ in found) == wanted
    batches = list(data)
    used = sum(x["padding_mask"].sum() for x, *_ in batches)
    rows = sum(len(y) for _, y, _ in batches)
    # All but the last rows are full, nearly.
    assert used / (16 * rows) > 0.9
    assert all(len(y) == 4 for _, y, _ in batches[:-1])
    for first, second in zip(data, data):
        np.testing.assert_array_equal(first[0]["token_ids"], second[0]["token_ids"])
    whole = PackedDocuments(documents, None, 16, 4, drop_remainder=True)
    assert {len(y) for _, y, _ in whole} == {4}


def test_a_long_document_keeps_all_targets():
    found = documents_of(PackedDocuments([range(1, 21)], sequence_length=8))
    assert [len(x) for x, *_ in found] == [8, 8, 3]
    assert np.concatenate([y for _, y, _ in found]).tolist() == [*range(2, 21)]


def test_texts_and_answers():
    preprocessor = make_lm().preprocessor
    found = documents_of(PackedDocuments(["ab", "\x02c"], preprocessor))
    # A text that begins with the start token gets no second one.
    assert [x.tolist() for x, *_ in found] == [[2, 97, 98], [2, 99]]
    assert [y.tolist() for _, y, _ in found] == [[97, 98, 1], [99, 1]]
    answers = {"prompts": ["ab", "c"], "responses": ["d", ""]}
    found = documents_of(PackedDocuments(answers, preprocessor))
    assert [w.tolist() for *_, w in found] == [[0, 0, 1, 1], [0, 1]]
    weights = to_numpy(preprocessor(answers)[2])
    for row, (*_, alone) in zip(weights, found, strict=True):
        assert row[: len(alone)].tolist() == alone.tolist()


def test_training_sees_no_difference(recwarn):
    packed, padded = make_lm(16), make_lm(16)
    data = PackedDocuments(TEXTS, padded.preprocessor, batch_size=9)
    assert len(next(iter(data))[1]) < len(TEXTS)
    expected = padded.evaluate(TEXTS, verbose=0)
    assert_close(packed.evaluate(data, verbose=0), expected, atol=1e-5)
    packed.fit(data, verbose=0)
    # Its length is not known, and that is no fault.
    assert not [x for x in recwarn if "ran out of data" in str(x.message)]
    padded.fit(TEXTS, batch_size=9, verbose=0)
    for a, b in zip(packed.weights, padded.weights, strict=True):
        assert_close(a, b, atol=1e-5)


def test_a_dataset():
    texts = tf.data.Dataset.from_tensor_slices(TEXTS)
    preprocessor = make_lm().preprocessor
    data = PackedDocuments(texts, preprocessor, batch_size=2).as_dataset()
    assert isinstance(data, tf.data.Dataset)
    given = PackedDocuments(TEXTS, preprocessor, batch_size=2)
    for found, wanted in zip(data.as_numpy_iterator(), given, strict=True):
        for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted)):
            np.testing.assert_array_equal(a, b)


def test_an_iterator_of_documents_is_read_once():
    documents = [[3] * 9] * 40

    def pack(some):
        # Three documents in each of 14 rows.
        return PackedDocuments(some, sequence_length=24, batch_size=4)

    found = []
    for some in (documents, iter(documents)):
        lm = make_lm(24)
        loss = lm.fit(pack(some), verbose=0).history["loss"]
        found.append([int(lm.optimizer.iterations), *loss])
    assert found[0][0] == 4
    assert_close(*found, atol=1e-5)
    expected = lm.evaluate(pack(documents), verbose=0)
    assert_close(lm.evaluate(pack(iter(documents)), verbose=0), expected)
    history = lm.fit(pack(iter(documents)), epochs=2, steps_per_epoch=2, verbose=0)
    assert len(history.history["loss"]) == 2
    once = pack(iter(documents))
    with raises(ValueError, "`x` can be read only once", "`steps_per_epoch`"):
        lm.fit(once, epochs=2, verbose=0)
    with raises(ValueError, "`validation_data` can be read only once"):
        lm.fit(pack(documents), validation_data=once, epochs=2, verbose=0)
    with raises(ValueError, "`documents` can be read only once", "`fit`"):
        once.as_dataset()
    # None of these errors has read any.
    assert sum(len(y) for _, y, _ in once) == 14


def test_wrong_documents():
    with raises(TypeError, "documents", "iterable"):
        PackedDocuments("abc", sequence_length=4)
    with raises(ValueError, "sequence_length"):
        PackedDocuments([[1, 2]])
    with raises(ValueError, "preprocessor"):
        next(iter(PackedDocuments(["abc"], sequence_length=4)))
    with raises(TypeError, "documents", "token ids"):
        next(iter(PackedDocuments([[0.5, 1.0]], sequence_length=4)))
    answers = {"prompts": ["a", "b"], "responses": ["c"]}
    with raises(ValueError, "`documents` must have a response", "2 prompts and 1"):
        PackedDocuments(answers, sequence_length=4)
