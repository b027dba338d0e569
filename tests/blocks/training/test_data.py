"""What `fit` reads: every kind of batches, prompts with responses."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from blocks import CausalLMPreprocessor
from tests import models
from tests.helpers import EAGER, raises, to_numpy
from tests.models import make_lm

pytestmark = pytest.mark.same_everywhere

TEXTS = ["ab", "cde", "f", "ghij"]


def make_text_lm():
    lm = models.make_text_lm()
    lm.compile(keras.optimizers.Adam(1e-2), sampler="greedy", run_eagerly=EAGER)
    return lm


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays
        self.epochs = 0

    def __len__(self):
        return 2

    def __getitem__(self, i):
        parts = tuple(x[2 * i : 2 * i + 2] for x in self.arrays)
        return parts if len(parts) > 1 else parts[0]

    def on_epoch_end(self):
        self.epochs += 1


def losses(make, data, **kwargs):
    keras.utils.set_random_seed(0)
    lm = make()
    # Tracing on TensorFlow takes far longer than a few steps.
    lm.run_eagerly = keras.config.backend() == "tensorflow"
    return lm.fit(data, verbose=0, shuffle=False, **kwargs).history["loss"]


def check_same(make, kinds, expected):
    """Each epoch's loss depends on all batches before, in their order."""
    expected = losses(make, expected, epochs=3)
    for kind in kinds:
        np.testing.assert_allclose(losses(make, kind(), epochs=3), expected, rtol=1e-4)


def test_batches_of_tokens():
    tokens = np.random.default_rng(0).integers(1, 60, (4, 6)).astype("int32")
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    weights = np.random.default_rng(1).uniform(size=(4, 6)).astype("float32")
    expected = tf.data.Dataset.from_tensor_slices((x, tokens, weights)).batch(2)

    def parts(i):
        rows = slice(2 * i, 2 * i + 2)
        return {k: v[rows] for k, v in x.items()}, tokens[rows], weights[rows]

    def endless():
        while True:
            yield from map(parts, range(2))

    class Indexed(Batches):
        def __getitem__(self, i):
            return parts(i)

    kinds = [lambda: Indexed(tokens), lambda: Listed(parts)]
    check_same(make_lm, kinds, expected)
    found = losses(make_lm, endless(), epochs=2, steps_per_epoch=2)
    np.testing.assert_allclose(found, losses(make_lm, expected, epochs=2), rtol=1e-4)


class Listed:
    """An iterable of batches that is none of Keras's kinds."""

    def __init__(self, parts, count=2):
        self.parts, self.count = parts, count

    def __iter__(self):
        return map(self.parts, range(self.count))

    def __len__(self):
        # Keras's optimizers on TensorFlow count a step too many in each epoch of
        # data of unknown size.
        return self.count


def test_batches_of_text():
    dataset = Batches(np.array(TEXTS))
    kinds = [lambda: dataset, lambda: Listed(lambda i: TEXTS[2 * i : 2 * i + 2])]
    expected = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2)
    check_same(make_text_lm, kinds, expected)
    assert dataset.epochs >= 2
    lm = make_text_lm()
    expected = lm.evaluate(expected, verbose=0)
    for kind in kinds:
        np.testing.assert_allclose(lm.evaluate(kind(), verbose=0), expected, rtol=1e-5)
    found = lm.evaluate(iter([TEXTS[:2], TEXTS[2:]]), verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with raises(ValueError, "`x` has no batch"):
        lm.fit(Listed(None, 0))


# Each makes the same texts, in batches of two.
KINDS = {
    "memory": lambda: TEXTS,
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices(TEXTS).batch(2),
    "PyDataset": lambda: Batches(np.array(TEXTS)),
    "generator": lambda: iter([TEXTS[:2], TEXTS[2:]]),
    "iterable": lambda: Listed(lambda i: TEXTS[2 * i : 2 * i + 2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_out_may_be_of_another_kind(kind, recwarn):
    lm = make_text_lm()
    for other in KINDS:
        data, held_out = KINDS[kind](), KINDS[other]()
        history = lm.fit(data, validation_data=held_out, verbose=0).history
        expected = lm.evaluate(TEXTS, verbose=0)[0]
        np.testing.assert_allclose(
            history["val_loss"], expected, rtol=1e-5, err_msg=other
        )
    assert not [w for w in recwarn if "ran out of data" in str(w.message)]
    if kind != "memory":
        with raises(ValueError, "`validation_split`", "`validation_data`", "x="):
            lm.fit(KINDS[kind](), validation_split=0.5, verbose=0)
        with raises(ValueError, "sample_weight"):
            lm.fit(KINDS[kind](), sample_weight=np.ones(4), verbose=0)


def test_data_without_a_batch():
    lm = make_text_lm()
    empty = KINDS["tf.data"]().take(0)
    with raises(ValueError, "`x` has no batch"):
        lm.fit(empty, verbose=0)
    with raises(ValueError, "`validation_data` has no batch"):
        lm.fit(TEXTS, validation_data=empty, verbose=0)
    tokens = tf.data.Dataset.from_tensors(lm.preprocessor(TEXTS))
    with raises(ValueError, "has no batch"):
        lm.fit(tokens.filter(lambda *batch: False), verbose=0)
    with raises(ValueError, "`x` has no batch in epoch 2", "only once"):
        lm.fit(KINDS["generator"](), epochs=2, steps_per_epoch=2, verbose=0)


def test_samples_are_held_out_once():
    lm = make_text_lm()
    for held_out, batches in ((None, 1), (TEXTS, 2)):
        options = {"validation_split": 0.5, "validation_data": held_out}
        lm.fit(TEXTS, batch_size=2, **options, verbose=0)
        assert int(lm.optimizer.iterations) == batches
        lm.optimizer.iterations.assign(0)


def test_data_without_end(recwarn):
    class Endless(Batches):
        num_batches = None

        def __getitem__(self, i):
            return super().__getitem__(i % 2)

    lm = make_text_lm()
    options = {"steps_per_epoch": 2, "validation_steps": 2, "verbose": 0}
    endless = Endless(np.array(TEXTS))
    history = lm.fit(endless, validation_data=endless, **options).history
    expected = lm.evaluate(TEXTS, verbose=0)[0]
    np.testing.assert_allclose(history["val_loss"], expected, rtol=1e-5)
    assert not [w for w in recwarn if "shuffle" in str(w.message)]


def test_batches_of_torch_and_hugging_face():
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(TEXTS, batch_size=2)
    expected = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2)
    check_same(make_text_lm, [lambda: loader], expected)
    lm = make_text_lm()
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    found = lm.evaluate(table, batch_size=2, verbose=0)
    np.testing.assert_allclose(found, lm.evaluate(expected, verbose=0), rtol=1e-5)


def test_prompts_are_no_targets():
    preprocessor = CausalLMPreprocessor(
        keras_hub.tokenizers.ByteTokenizer(), 8, start_token=2, end_token=1
    )
    answers = {"prompts": ["ab", "cdefghijkl", ""], "responses": ["xyz", "q", "r"]}
    x, y, weights = preprocessor(answers)
    data = tf.data.Dataset.from_tensor_slices(answers).batch(3).map(preprocessor)
    mapped = next(iter(data.as_numpy_iterator()))
    for found in ((x, y, weights), mapped):
        tokens, targets, counted = found[0]["token_ids"], *found[1:]
        assert to_numpy(tokens)[0].tolist() == [2, *b"abxyz", 1, 0]
        assert to_numpy(targets)[0].tolist() == [*b"abxyz", 1, 0, 0]
        assert to_numpy(counted).astype(int).tolist() == [
            [0, 0, 1, 1, 1, 1, 0, 0],
            # The response does not fit.
            [0] * 8,
            [1, 1, 0, 0, 0, 0, 0, 0],
        ]
        assert to_numpy(found[0]["padding_mask"])[0].sum() == 7
    lm = make_text_lm()
    lm.fit(answers, verbose=0)
    for texts, error in (
        ({"prompts": ["a"]}, TypeError),
        ({"prompts": "a", "responses": ["b"]}, TypeError),
        ({"prompts": ["a"], "responses": [1]}, TypeError),
        ({"prompts": ["a"], "responses": ["b", "c"]}, ValueError),
        ({"prompts": ["a"], "responses": [""]}, ValueError),
    ):
        with raises(error, "`x` must", "Received"):
            lm.fit(texts, verbose=0)


@pytest.mark.parametrize(
    "x", [TEXTS, {"prompts": ["a", "bc", "d", "e"], "responses": TEXTS}]
)
def test_texts_have_weights(x):
    """Those of the targets of a row are multiplied by it."""
    lm, weights = make_text_lm(), np.array([2.0, 0.0, 0.5, 1.0])
    tokens, y, mask = keras.tree.map_structure(to_numpy, lm.preprocessor(x))
    by_target = tokens, y, mask * weights[:, None].astype("float32")
    found = lm.preprocessor(x, sample_weight=weights)
    np.testing.assert_array_equal(to_numpy(found[2]), by_target[2])
    expected = lm.evaluate(*by_target[:2], sample_weight=by_target[2], verbose=0)
    halves = [
        (
            {k: v[i : i + 2] for k, v in x.items()}
            if isinstance(x, dict)
            else x[i : i + 2]
        )
        for i in (0, 2)
    ]
    batches = [(half, None, weights[i : i + 2]) for half, i in zip(halves, (0, 2))]
    dataset = tf.data.Dataset.from_tensor_slices((x, weights, weights)).batch(2)
    for kind in (iter(batches), dataset, dataset.map(lm.preprocessor)):
        np.testing.assert_allclose(lm.evaluate(kind, verbose=0), expected, rtol=1e-5)
    found = lm.evaluate(x, sample_weight=weights, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    histories = []
    for samples in ((x, None, weights), by_target):
        other = make_text_lm()
        other.set_weights(lm.get_weights())
        data, y, w = samples
        options["validation_data"] = samples
        history = other.fit(data, y, sample_weight=w, **options).history
        histories.append([*history["loss"], *history["val_loss"]])
    np.testing.assert_allclose(*histories, rtol=1e-4)
    for wrong in (weights[:3], np.ones((4, 8)), 1.0):
        for call in (lm.fit, lm.evaluate):
            with raises(ValueError, "`sample_weight`", "(4,)", "Received"):
                call(x, sample_weight=wrong, verbose=0)
    with raises(ValueError, "`sample_weight`", "(2,)", "Received"):
        lm.fit(iter([(halves[0], None, np.ones((2, 8)))]), verbose=0)
