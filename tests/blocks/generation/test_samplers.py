"""Every sampler of KerasHub, a user's own, and the ways to compile."""

import threading

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from tests.models import (
    RAGGED,
    VOCABULARY_SIZE,
    brute_force_greedy,
    log_softmax,
    make_backbone,
    make_small_lm,
    next_token_logits,
    prompts,
    rows_of,
)


def sample(lm, sampler, rows=RAGGED, stop_token_ids=None, **kwargs):
    lm.compile(sampler=sampler, **kwargs)
    outputs = lm.generate(prompts(rows), stop_token_ids=stop_token_ids, max_length=13)
    return rows_of(outputs)


@pytest.fixture(scope="module")
def sampling_lm():
    """A model that tests may compile again."""
    return make_small_lm(make_backbone(num_layers=1))


@pytest.fixture(scope="module")
def expected(sampling_lm):
    """The greedy continuation of the ragged prompts to 13 tokens."""
    return brute_force_greedy(sampling_lm, RAGGED, [13] * 3)


@pytest.mark.parametrize("name", ["greedy", "top_k", "top_p", "random"])
def test_samplers_by_name(sampling_lm, name, expected):
    rows = sample(sampling_lm, name)
    assert [len(row) for row in rows] == [13] * 3
    assert [row[: len(p)] for row, p in zip(rows, RAGGED)] == RAGGED
    assert all(0 <= t < VOCABULARY_SIZE for row in rows for t in row)
    if name == "greedy":
        assert rows == expected


def test_threads_never_draw_from_one_seed(sampling_lm):
    sampler = keras_hub.samplers.RandomSampler(temperature=100.0, seed=1)
    sampling_lm.compile(sampler=sampler)
    x = prompts([[5, 6]] * 8)
    drawn = []

    def draw(times=40):
        for _ in range(times):
            outputs = sampling_lm.generate(x, stop_token_ids=None, max_new_tokens=1)
            drawn.append(tuple(outputs["token_ids"][:, 2].tolist()))

    draw(times=1)  # compiles
    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Eight tokens that are the same by chance are one in millions.
    assert len(set(drawn)) == len(drawn) == 161


def test_a_seed_gives_the_same_tokens_again(sampling_lm):
    def make():
        return keras_hub.samplers.RandomSampler(temperature=3.0, seed=7)

    first = sample(sampling_lm, make())
    x = prompts(RAGGED)
    second = rows_of(sampling_lm.generate(x, stop_token_ids=None, max_length=13))
    assert first != second  # the seed moves on
    again = sample(sampling_lm, make())
    assert again == first


def brute_force_beams(lm, row, length, num_beams):
    """Beam search over the model without a cache."""
    beams = [(0.0, list(row))]
    while len(beams[0][1]) < length:
        rows = [tokens for _, tokens in beams]
        rows += [rows[0]] * (num_beams - len(rows))
        scores = log_softmax(next_token_logits(lm, rows, 32))
        candidates = [
            (total + scores[i, token], [*tokens, token])
            for i, (total, tokens) in enumerate(beams)
            for token in range(VOCABULARY_SIZE)
        ]
        beams = sorted(candidates, key=lambda beam: -beam[0])[:num_beams]
    return beams[0][1]


def test_beam_search_equals_brute_force(sampling_lm):
    wanted = [brute_force_beams(sampling_lm, row, 13, 3) for row in RAGGED]
    sampler = keras_hub.samplers.BeamSampler(num_beams=3)
    assert sample(sampling_lm, sampler) == wanted
    greedy = brute_force_greedy(sampling_lm, RAGGED, [13] * 3)
    assert wanted != greedy
    # With stop tokens, rows end where they would end alone.
    stop = wanted[0][8]
    batch = sample(sampling_lm, sampler, stop_token_ids=[stop])
    alone = [
        sample(sampling_lm, sampler, [row], stop_token_ids=[stop])[0] for row in RAGGED
    ]
    assert batch == alone
    assert stop not in [t for row, p in zip(batch, RAGGED) for t in row[len(p) : -1]]


def test_contrastive_search_of_a_batch_equals_each_alone(sampling_lm):
    rows = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10, 11]]
    sampler = keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.3)
    batch = sample(sampling_lm, sampler, rows)
    assert batch == [sample(sampling_lm, sampler, [row])[0] for row in rows]
    assert batch != brute_force_greedy(sampling_lm, rows, [13] * 3)


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


def test_a_users_sampler(sampling_lm, expected):
    forbidden = np.zeros(VOCABULARY_SIZE)
    first = [row[len(p)] for row, p in zip(expected, RAGGED)]
    forbidden[first] = 1
    sampler = ForbiddingSampler(forbidden)
    rows = sample(sampling_lm, sampler)
    new = {t for row, p in zip(rows, RAGGED) for t in row[len(p) :]}
    assert not new & set(first)
    # Another array on the same sampler counts once the model is compiled again.
    sampler.forbidden = np.zeros(VOCABULARY_SIZE, "float32")
    assert sample(sampling_lm, sampler) == expected


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


def test_what_counts_of_a_sampler_is_its_config_and_its_variables(sampling_lm):
    def make():
        return keras_hub.samplers.TopPSampler(p=0.99, seed=7)

    x, options = prompts(RAGGED), {"stop_token_ids": None, "max_length": 13}
    expected, found = [], []
    for sampler, rows in ((make(), expected), (Delegating(make()), found)):
        sampling_lm.compile(sampler=sampler)
        rows += [rows_of(sampling_lm.generate(x, **options)) for _ in range(2)]
    # Each call draws new numbers, as does each step.
    assert found == expected
    assert found[0] != found[1]
    # The longest row gets 12 tokens in each of two calls.
    assert int(sampler.drawn) == 24
    # So small a `p` lets only the likeliest token through: the config has changed.
    sampler.inner[0].p = 1e-6
    greedy = brute_force_greedy(sampling_lm, RAGGED, [13] * 3)
    assert rows_of(sampling_lm.generate(x, **options)) == greedy
    # Another value of a variable compiles nothing.
    before = sampling_lm.compilations
    sampler.drawn.assign(0)
    sampling_lm.generate(x, **options)
    assert int(sampler.drawn) == 12
    assert sampling_lm.compilations == before


def test_a_users_loop(sampling_lm):
    rows = sample(sampling_lm, RepeatingSampler())
    assert rows == [[*row, *[row[-1]] * (13 - len(row))] for row in RAGGED]


# === Compiling ===


@pytest.mark.parametrize(
    "how", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}]
)
def test_ways_to_compile(sampling_lm, expected, how):
    rows = sample(sampling_lm, "greedy", **how)
    assert rows == expected
