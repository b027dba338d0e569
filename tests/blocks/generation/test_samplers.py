"""Every sampler of KerasHub, a user's own, and the ways to compile."""

import threading

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from tests.helpers import slow
from tests.models import (
    RAGGED,
    VOCABULARY_SIZE,
    brute_force_greedy,
    generated,
)


def sample(lm, sampler, rows=RAGGED, stop_token_ids=None, **kwargs):
    lm.compile(sampler=sampler, **kwargs)
    return generated(lm, rows, stop_token_ids=stop_token_ids, max_length=13)


@pytest.fixture(scope="module")
def expected(lm):
    """The greedy continuation of the ragged prompts to 13 tokens."""
    return brute_force_greedy(lm, RAGGED, 13)


def test_threads_never_draw_from_one_seed(lm):
    sampler = keras_hub.samplers.RandomSampler(temperature=100.0, seed=1)
    lm.compile(sampler=sampler)
    drawn = []

    def draw(times=40):
        for _ in range(times):
            rows = generated(lm, [[5, 6]] * 8, max_new_tokens=1)
            drawn.append(tuple(row[2] for row in rows))

    draw(times=1)  # compiles
    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Eight tokens that are the same by chance are one in millions.
    assert len(set(drawn)) == len(drawn) == 161


@pytest.mark.parametrize(
    "sampler",
    [
        keras_hub.samplers.BeamSampler(num_beams=3),
        slow(keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.3)),
    ],
)
def test_searches_of_a_batch_equal_each_alone(lm, expected, sampler):
    free = sample(lm, sampler)
    stop = free[0][8]
    ended = sample(lm, sampler, stop_token_ids=stop)
    assert expected != free != ended
    for stops, batch in ((None, free), (stop, ended)):
        alone = [sample(lm, sampler, [row], stop_token_ids=stops) for row in RAGGED]
        assert [[row] for row in batch] == alone


class ForbiddingSampler(keras_hub.samplers.Sampler):
    """A user's own sampler, which changes how a token is chosen."""

    def __init__(self, forbidden, **kwargs):
        super().__init__(**kwargs)
        self.forbidden = np.asarray(forbidden, "float32")

    def get_next_token(self, probabilities):
        allowed = 1.0 - ops.convert_to_tensor(self.forbidden)
        return ops.argmax(probabilities * allowed, axis=-1)


class RepeatingSampler(keras_hub.samplers.Sampler):
    """A user's own sampler with a loop of its own: the last token again."""

    def __call__(self, next, prompt, cache=None, index=0, **kwargs):
        last = ops.slice(prompt, (0, index - 1), (prompt.shape[0], 1))
        positions = ops.arange(prompt.shape[1])[None, :]
        return ops.where(positions < index, prompt, last)


def test_a_users_sampler(lm, expected):
    first = [row[len(p)] for row, p in zip(expected, RAGGED)]
    sampler = ForbiddingSampler(np.isin(np.arange(VOCABULARY_SIZE), first))
    rows = sample(lm, sampler)
    assert not set(first) & {t for row, p in zip(rows, RAGGED) for t in row[len(p) :]}
    # Another array on the same sampler counts once the model is compiled again.
    sampler.forbidden = np.zeros(VOCABULARY_SIZE, "float32")
    assert sample(lm, sampler) == expected


class Delegating(keras_hub.samplers.Sampler):
    """A user's own sampler that keeps the contract: another's seed and settings count."""

    def __init__(self, inner):
        super().__init__()
        self.inner = [inner]
        self.drawn = keras.Variable(0, dtype="int32", trainable=False)

    @property
    def variables(self):
        return [*self.inner[0].variables, self.drawn]

    def get_config(self):
        return {"inner": self.inner[0]}

    def get_next_token(self, probabilities):
        self.drawn.assign(self.drawn + 1)
        return self.inner[0].get_next_token(probabilities)


def test_what_counts_of_a_sampler_is_its_config_and_its_variables(lm, expected):
    def make():
        return keras_hub.samplers.TopPSampler(p=0.99, seed=7)

    drawn = []
    for sampler in (make(), Delegating(make())):
        lm.compile(sampler=sampler)
        drawn.append([generated(lm, max_length=13) for _ in range(2)])
    # Each call draws new numbers, as does each step.
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
    # The longest row gets 12 tokens in each of two calls.
    assert int(sampler.drawn) == 24
    # So small a `p` lets only the likeliest token through: the config has changed.
    sampler.inner[0].p = 1e-6
    assert generated(lm, max_length=13) == expected
    # Another value of a variable compiles nothing.
    before = lm.compilations
    sampler.drawn.assign(0)
    generated(lm, max_length=13)
    assert int(sampler.drawn) == 12
    assert lm.compilations == before


def test_a_users_loop(lm):
    rows = sample(lm, RepeatingSampler())
    assert rows == [[*row, *[row[-1]] * (13 - len(row))] for row in RAGGED]


@pytest.mark.parametrize(
    "how", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}]
)
def test_ways_to_compile(lm, expected, how):
    assert sample(lm, "greedy", **how) == expected
