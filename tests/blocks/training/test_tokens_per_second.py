"""`fit` shows how many tokens it trains on in a second."""

import time

import keras
import numpy as np
import pytest

from blocks import CausalLM, Perplexity
from blocks.training import tokens_per_second
from tests.models import make_backbone

NAME = "tokens_per_second"
LENGTHS = np.array([8, 3, 5, 1, 8, 8, 2, 4, 7])


def data():
    mask = (np.arange(8) < LENGTHS[:, None]).astype("int32")
    # Also where few tokens are targets: weights say nothing of how many there are.
    weights = mask * np.random.default_rng(0).choice([0.0, 0.5], mask.shape)
    return {"token_ids": mask, "padding_mask": mask}, mask, weights


def made(loss="auto", **kwargs):
    lm = CausalLM(make_backbone(num_layers=1))
    metrics = ["accuracy", Perplexity()] if loss == "auto" else []
    lm.compile(keras.optimizers.SGD(0.01), loss, weighted_metrics=metrics, **kwargs)
    return lm


def fit(lm, **kwargs):
    x, y, weights = data()
    options = {"batch_size": 2, "shuffle": False, "verbose": 0, **kwargs}
    return lm.fit(x, y, sample_weight=weights, **options).history


class Seen(keras.callbacks.Callback):
    """Not said to be safe beside the training, so all run in the order of steps."""

    def __init__(self):
        super().__init__()
        self.rates = {}

    def on_train_batch_end(self, batch, logs=None):
        self.rates[batch] = logs.get(NAME)


@pytest.mark.parametrize("at_once", [1, 2])
def test_rates_are_those_of_real_tokens(at_once, monkeypatch):
    """On a clock on which each step takes a second."""
    if at_once > 1 and keras.config.backend() == "torch":
        pytest.skip("Keras has it not there")
    lm, seen = made(steps_per_execution=at_once), Seen()
    # The end of each (or each two) of the five batches, as Keras counts them.
    ends = range(at_once - 1, 4 + at_once, at_once)
    total = [LENGTHS[: 2 * (end + 1)].sum() for end in ends]
    seconds = np.arange(len(ends))
    clock = iter(range(100))
    monkeypatch.setattr(tokens_per_second, "perf_counter", lambda: next(clock))
    history = fit(lm, epochs=1, callbacks=[seen])
    # The first step, which compiles, is left out.
    expected = [None, *((total - total[0])[1:] / seconds[1:])]
    assert seen.rates == dict(zip(ends, expected))
    assert history[NAME] == [expected[-1]]
    history = fit(lm, epochs=3, callbacks=[seen], validation_data=data())
    expected = total / (seconds + 1)
    assert seen.rates == dict(zip(ends, expected))
    assert history[NAME][1:] == [expected[-1]] * 2


def test_nothing_else_shows_it():
    lm = made()
    x, y, weights = data()
    start = time.perf_counter()
    # On JAX and torch beside the training.
    history = fit(lm, epochs=2, validation_data=(x, y, weights))
    least = (LENGTHS.sum() - 9) / (time.perf_counter() - start)
    assert all(least < rate < np.inf for rate in history[NAME])
    names = {"loss", "accuracy", "perplexity"}
    assert set(history) == {*names, *(f"val_{x}" for x in names), NAME}
    assert set(lm.metrics_names) == names
    assert set(lm.evaluate(x, y, verbose=0, return_dict=True)) == names
    assert set(lm.train_on_batch(x, y, return_dict=True)) == names
    assert len(lm.train_on_batch(x, y)) == len(lm.test_on_batch(x, y)) == 3


def test_what_is_not_measured():
    # All of an epoch is the step that compiles.
    history = fit(made(), batch_size=9, epochs=2)
    assert np.isnan(history[NAME][0]) and history[NAME][1] > 0
    # Keras's own loss counts no tokens.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert NAME not in fit(made(loss))


def test_the_progress_bar_shows_it(capsys):
    fit(made(), verbose=2)
    assert f" - {NAME}: " in capsys.readouterr().out
