"""Processors, filters and random numbers, against transformers and published values."""

import numpy as np
import pytest
from keras import ops, tree

from blocks import TokensSoFar
from blocks.generation.drawing import draw, filter_logits, threefry, uniform
from blocks.generation.processors import (
    FrequencyPenalty,
    LogitBias,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
)
from tests.helpers import assert_close, to_numpy

VOCABULARY = 7
ROWS = [[1, 2, 3, 1, 2], [4, 4, 4], [6, 5, 6, 5, 6, 5, 6]]
PROMPTS = np.array([2, 1, 5], "int32")


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(3, VOCABULARY)).astype("float32") * 3


def tokens_so_far():
    # What is behind a row must not count.
    ids = np.full((3, 9), 3, "int32")
    for row, tokens in zip(ids, ROWS):
        row[: len(tokens)] = tokens
    lengths = np.array(list(map(len, ROWS)), "int32")
    return TokensSoFar(*map(ops.convert_to_tensor, (ids, lengths, PROMPTS)))


def process(processor, logits):
    tokens = tokens_so_far()
    state = tree.map_structure(ops.convert_to_tensor, processor.create_state(tokens))
    return to_numpy(processor.call(ops.convert_to_tensor(logits), tokens, state)[0])


def of_transformers(make, logits):
    """What a processor of transformers makes of each row alone."""
    torch = pytest.importorskip("torch")
    found = [
        make(i)(torch.tensor([tokens]), torch.tensor(logits[i : i + 1]))[0].numpy()
        for i, tokens in enumerate(ROWS)
    ]
    return np.stack(found)


def test_repetition_penalty_is_that_of_transformers(logits):
    kind = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor
    penalties = np.array([1.5, 0.8, 1.0], "float32")
    expected = of_transformers(lambda i: kind(float(penalties[i])), logits)
    assert_close(process(RepetitionPenalty(penalties), logits), expected, 1e-6)


@pytest.mark.parametrize("sizes", [(1, 2, 3), (2, 3, 4), (3, 4, 2), (8, 2, 7)])
def test_no_repeat_ngram_is_that_of_transformers(logits, sizes):
    kind = pytest.importorskip("transformers").NoRepeatNGramLogitsProcessor
    expected = of_transformers(lambda i: kind(sizes[i]), logits)
    found = process(NoRepeatNgram(np.array(sizes, "int32")), logits)
    np.testing.assert_array_equal(found, expected)


def test_no_repeat_ngram_of_0_changes_nothing(logits):
    found = process(NoRepeatNgram(np.array([0, 0, 2], "int32")), logits)
    np.testing.assert_array_equal(found[:2], logits[:2])
    assert np.isinf(found[2]).sum() == 1


def test_logit_bias_is_that_of_transformers(logits):
    kind = pytest.importorskip("transformers").SequenceBiasLogitsProcessor
    bias = {2: 1.5, 5: -np.inf}
    ids = np.array([[2, 5, 0]] * 3, "int32")
    values = np.array([[1.5, -np.inf, 0]] * 3, "float32")
    expected = of_transformers(
        lambda _: kind({(k,): v for k, v in bias.items()}), logits
    )
    assert_close(process(LogitBias(ids, values), logits), expected, 1e-6)


def test_presence_and_frequency_count_new_tokens(logits):
    numbers = np.array([0.5, 1.0, -2.0], "float32")
    counts = np.zeros_like(logits)
    for i, (tokens, start) in enumerate(zip(ROWS, PROMPTS)):
        np.add.at(counts[i], tokens[start:], 1)
    expected = logits - numbers[:, None] * (counts > 0)
    assert_close(process(PresencePenalty(numbers), logits), expected, 1e-6)
    expected = logits - numbers[:, None] * counts
    assert_close(process(FrequencyPenalty(numbers), logits), expected, 1e-6)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (3, 1.0, 0.0),
        (0, 0.7, 0.0),
        (0, 1.0, 0.2),
        (5, 0.8, 0.1),
        (1, 0.1, 1),
    ],
)
def test_filters_are_those_of_transformers(logits, top_k, top_p, min_p):
    transformers = pytest.importorskip("transformers")
    warpers = [
        transformers.TopPLogitsWarper(top_p),
        transformers.MinPLogitsWarper(float(min_p)),
    ]
    if top_k:
        warpers.insert(0, transformers.TopKLogitsWarper(top_k))
    expected = of_transformers(
        lambda _: transformers.LogitsProcessorList(warpers), logits
    )
    numbers = [np.full(3, top_k, "int32")]
    numbers += [np.full(3, x, "float32") for x in (top_p, min_p)]
    found = filter_logits(*map(ops.convert_to_tensor, (logits, *numbers)))
    np.testing.assert_array_equal(to_numpy(found), expected)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_filters_of_a_larger_vocabulary(spread):
    """Whether they keep few tokens or many."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = (spread * rng.normal(size=(7, 900))).astype("float32")
    top_k = [40, 500, 0, 0, 0, 0, 300]
    top_p = [0.9, 1.0, 0.95, 1.0, 0.2, 1.0, 0.5]
    min_p = [0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.01]
    for rows in (slice(None), slice(0, 1), slice(4, 6)):
        numbers = [np.array(top_k, "int32")]
        numbers += [np.array(x, "float32") for x in (top_p, min_p)]
        given = (logits, *numbers)
        found = filter_logits(*(ops.convert_to_tensor(x[rows]) for x in given))
        for row, got in zip(range(7)[rows], to_numpy(found)):
            kinds = [transformers.TopPLogitsWarper(top_p[row])]
            kinds += [transformers.MinPLogitsWarper(min_p[row])]
            if top_k[row]:
                kinds.insert(0, transformers.TopKLogitsWarper(top_k[row]))
            wanted = transformers.LogitsProcessorList(kinds)(
                torch.tensor([[0]]), torch.tensor(logits[row : row + 1])
            )
            assert (np.isfinite(got) != np.isfinite(wanted[0].numpy())).sum() <= 1, row


def test_threefry_gives_the_published_values():
    # The known answers of Random123, for 20 rounds.
    cases = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((-1, -1), (-1, -1), (0x1CB996FC, 0xBB002BE7)),
        (
            (0x13198A2E, 0x03707344),
            (0x243F6A88, 0x85A308D3),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ]
    for key, counter, expected in cases:
        parts = np.array([key, counter], "int64").astype("uint32").view("int32")
        key, counter = ([ops.convert_to_tensor(x[None]) for x in y] for y in parts)
        found = [int(to_numpy(x)[0]) & 0xFFFFFFFF for x in threefry(key, counter)]
        assert found == list(expected)


def test_numbers_are_uniform_and_of_a_seed_and_a_position():
    seeds = np.stack([np.arange(4000), np.zeros(4000)], 1).astype("int32")
    positions = np.full(4000, 17, "int32")
    found = to_numpy(uniform(*map(ops.convert_to_tensor, (seeds, positions))))
    assert found.min() > 0 and found.max() < 1
    counts = np.histogram(found, 10, (0, 1))[0]
    # The standard deviation of a count is 19.
    assert abs(counts - 400).max() < 80
    one = uniform(*map(ops.convert_to_tensor, (seeds[9:10], positions[:1])))
    assert to_numpy(one)[0] == found[9]
    other = uniform(*map(ops.convert_to_tensor, (seeds[9:10], positions[:1] + 1)))
    assert to_numpy(other)[0] != found[9]


def test_draws_by_the_distribution(logits):
    logits[:, 2] = -np.inf
    numbers = (np.arange(2000, dtype="float32") + 0.5) / 2000
    for row in logits:
        batch = np.repeat(row[None], 2000, 0)
        found = to_numpy(draw(*map(ops.convert_to_tensor, (batch, numbers))))
        chances = np.exp(row - row.max())
        chances /= chances.sum()
        counts = np.bincount(found, minlength=VOCABULARY)
        assert abs(counts / 2000 - chances).max() < 1e-3
        assert counts[2] == 0
