"""Data of `fit`: shuffled, and refused before the first step if it is wrong."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from blocks.training_data import batched
from tests.helpers import raises
from tests.models import RAGGED, make_backbone, make_lm, prompts

pytestmark = pytest.mark.same_everywhere


def test_samples_in_memory_are_shuffled_in_each_epoch():
    samples = {"a": np.arange(40), "b": [str(i) for i in range(40)]}
    data, held_out = batched(samples, 8, 0.25)
    epochs = [list(data.as_numpy_iterator()) for _ in range(2)]
    orders = [np.concatenate([batch["a"] for batch in epoch]) for epoch in epochs]
    assert [len(batch["a"]) for batch in epochs[0]] == [8, 8, 8, 6]
    for order, epoch in zip(orders, epochs):
        assert sorted(order) == list(range(30))
        texts = np.concatenate([batch["b"] for batch in epoch])
        assert [int(text) for text in texts] == order.tolist()
    assert len({tuple(order) for order in (range(30), *orders)}) == 3
    assert [len(batch["a"]) for batch in held_out] == [8, 2]
    assert batched(samples, 8, None)[1] is None


def test_data_are_not_tuned_while_they_are_read(monkeypatch):
    """Else whoever reads them waits at the end until a thread wakes up."""
    lm = make_lm(make_backbone(num_layers=1))
    x = prompts(RAGGED)
    y = x["token_ids"]
    given, fit = [], keras.Model.fit

    def watched(self, *args, **kwargs):
        given.append([*args, *kwargs.values()])
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", watched)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(3)
    tuned = tf.data.Options()
    tuned.autotune.enabled = True

    class Loader:
        def __iter__(self):
            return iter([(x, y)])

        def __len__(self):
            return 1

    for data, options, expected in (
        ((x, y), {"shuffle": True}, False),
        ((x, y), {"shuffle": False}, False),
        ((dataset,), {}, False),
        ((Loader(),), {}, False),
        ((dataset.with_options(tuned),), {}, True),
    ):
        lm.fit(*data, **options, validation_data=(x, y), verbose=0)
        read = [v for v in given[-1] if isinstance(v, tf.data.Dataset)]
        assert [v.options().autotune.enabled for v in read] == [expected, False]


@pytest.mark.slow
def test_what_fit_is_given_counts_once(text_lm, recwarn):
    """Each of the samples is learned once in an epoch, without a warning."""

    class Batches(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            count[0] += 1

    texts = np.array(["ab", "cd", "ef", "gh"])
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(1)
    for x, size in ((texts, 1), (texts.tolist(), 1), (dataset, None)):
        count = [0]
        text_lm.fit(x, batch_size=size, epochs=2, callbacks=[Batches()], verbose=0)
        assert count == [8]
    history = text_lm.fit(texts.tolist(), validation_split=0.5, verbose=0).history
    expected = text_lm.evaluate(texts[2:], return_dict=True, verbose=0)
    np.testing.assert_allclose(history["val_loss"], expected["loss"], rtol=1e-5)
    assert not [x for x in recwarn if "shuffle" in str(x.message)]


def test_what_stands_in_padded_places_plays_no_role(lm):
    x = prompts(RAGGED)
    other = {**x, "token_ids": np.where(x["padding_mask"], x["token_ids"], -100)}
    losses = [lm.evaluate(z, x["token_ids"], verbose=0)[0] for z in (x, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        ([], ValueError),
        ([""], ValueError),
        ([["a"], ["b"]], TypeError),
        (["a", None], TypeError),
        ([1, 2], TypeError),
        ("a", TypeError),
        ({"text": ["a"]}, TypeError),
    ],
)
def test_odd_text(text_lm, x, kind):
    with raises(kind, "`x` ", "Received: x="):
        text_lm.fit(x, verbose=0)


def test_odd_tokens(lm):
    x, y = prompts(RAGGED), np.zeros((3, 7), "int32")
    for token in (-1, 60):
        wrong = np.where(x["token_ids"] == 14, token, x["token_ids"])
        wrong = {**x, "token_ids": wrong}
        for call, *targets in ((lm.fit, y), (lm.evaluate, y), (lm.predict,)):
            with raises(ValueError, f"Token {token} at position 6 of row 1"):
                call(wrong, *targets, verbose=0)
        with raises(ValueError, f"Token {token}", "`y`"):
            lm.fit(x, np.full_like(y, token), verbose=0)
    left = {key: value[:, ::-1] for key, value in x.items()}
    for data, validation in ((left, None), (x, (left, y))):
        with raises(ValueError, "Row 0 of `padding_mask`", "on the right"):
            lm.fit(data, y, validation_data=validation, verbose=0)
    right, *others = (
        tf.data.Dataset.from_tensor_slices((z, y)).batch(2) for z in (x, left, wrong)
    )
    for data, part in zip(others, ("on the right", "vocabulary of 60 tokens")):
        for arguments in ((data, None), (right, data)):
            with raises(tf.errors.InvalidArgumentError, part):
                lm.fit(arguments[0], validation_data=arguments[1], verbose=0)
    # A loss may leave out what is no token.
    other = make_lm(lm.backbone)
    loss = keras.losses.SparseCategoricalCrossentropy(True, ignore_class=-1)
    other.compile("sgd", loss)
    assert np.isfinite(other.fit(x, y - 1, verbose=0).history["loss"])
