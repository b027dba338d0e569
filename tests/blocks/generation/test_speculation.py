"""Speculative decoding: the same outputs, from fewer steps."""

import keras_hub
import numpy as np
import pytest

from blocks import DraftModel, PromptLookup, Speculation
from tests.helpers import raises, slow
from tests.models import (
    RAGGED,
    Scripted,
    check_generation,
    generated,
    make_backbone,
    make_small_lm,
    make_variant,
    randomize,
)


def other_model(kind="mha"):
    """A model that guesses wrong most of the time."""
    backbone = make_variant(kind)
    randomize(backbone, seed=5)
    return make_small_lm(backbone)


@pytest.mark.parametrize("kind", ["rotary", *map(slow, ("mha", "leak"))])
def test_whatever_is_guessed_the_output_is_the_same(kind):
    lm = make_small_lm(make_variant(kind, num_layers=2 if kind == "leak" else 1))
    expected = check_generation(lm, max_new_tokens=12)
    right, half = Scripted(expected, 3), Scripted(expected, 3, wrong=3)
    guesses = {
        "right": right,
        "some wrong": half,
        "all wrong": Scripted(expected, 3, wrong=1),
        "lookup": PromptLookup(3),
    }
    if kind == "mha":
        guesses["itself"] = DraftModel(lm, 3)
        guesses["recurrent"] = DraftModel(other_model("leak"), 3)
    if kind == "leak":
        guesses["another"] = DraftModel(other_model(), 3)
    for name, guess in guesses.items():
        assert generated(lm, max_new_tokens=12, speculation=guess) == expected, name
    # Twelve tokens: one from the prompt, and up to four from each step.
    assert right.rounds == 3
    assert right.rounds < half.rounds < 11


@pytest.mark.xla
def test_stop_tokens_within_a_guess():
    lm = make_small_lm(make_backbone())
    whole = generated(lm, max_new_tokens=12)
    options = {"stop_token_ids": [whole[0][6], whole[1][11]], "max_new_tokens": 12}
    expected = generated(lm, **options)
    assert len({len(row) for row in expected}) > 1
    for speculation in (Scripted(whole, 4), PromptLookup(4)):
        assert generated(lm, **options, speculation=speculation) == expected


@pytest.mark.slow
def test_limits_of_rows_and_of_positions():
    lm = make_small_lm(make_backbone(max_sequence_length=16))
    small = make_small_lm(make_backbone(max_sequence_length=12, num_layers=1))
    # The last row is at its limit from the start.
    rows = [*RAGGED, list(range(16))]
    expected = check_generation(lm, rows, max_length=16)
    guesses = (Scripted(expected, 5), PromptLookup(5), DraftModel(small, 5))
    for guess in (*guesses, DraftModel(other_model("leak"), 2)):
        assert generated(lm, rows, max_length=16, speculation=guess) == expected


@pytest.mark.parametrize("kind", ["mha", "rotary"])
@pytest.mark.slow
def test_more_guesses_than_a_cache_has_room_for(kind):
    lm = other_model(kind)
    expected = generated(lm, max_new_tokens=9)
    for guess in (Scripted(expected, 100), DraftModel(lm, 100)):
        assert generated(lm, max_new_tokens=9, speculation=guess) == expected


def test_the_distribution_stays_the_same(lm):
    """A draft that always says the same must not make that more likely."""
    rows = [[1, 2, 3]] * 400

    class Always(Speculation):
        def propose(self, memory, rows):
            return [np.full((2,), favourite, "int32") for _ in rows]

    def counts(speculation):
        lm.compile(sampler=keras_hub.samplers.RandomSampler(temperature=4.0, seed=3))
        options = {"max_new_tokens": 4, "speculation": speculation}
        found = [generated(lm, rows, **options, strip_prompt=True) for _ in range(3)]
        return np.concatenate(found)

    favourite = 0
    plain = counts(None)
    favourite = int(np.bincount(plain[:, 1], minlength=60).argmax())
    fast = counts(Always(2))
    for place in range(4):
        a, b = (np.bincount(x[:, place], minlength=60) / len(x) for x in (plain, fast))
        # Two samples of 1200: the share of a token differs by less than this.
        assert np.abs(a - b).max() < 0.065
    # Pairs, too: tokens after an accepted guess are sampled given that guess.
    a, b = (
        np.mean((x[:, 1] == favourite) & (x[:, 2] == favourite)) for x in (plain, fast)
    )
    assert abs(a - b) < 0.05


def test_prompt_lookup_finds_the_latest_and_longest():
    lookup = PromptLookup(num_tokens=3, max_ngram=2)
    rows = [[1, 2, 7, 8, 2, 9, 1, 2], [3, 3, 3], [4, 5], [6], []]
    found = lookup.propose(None, [np.array(row, "int32") for row in rows])
    assert [x.tolist() for x in found] == [[7, 8, 2], [3], [], [], []]


def test_errors(lm):
    with raises(TypeError, "`model`", "CausalLM"):
        DraftModel(lm.backbone)
    with raises(ValueError, "`min_ngram`"):
        PromptLookup(max_ngram=1, min_ngram=2)
    with raises(TypeError, "`speculation`", "PromptLookup"):
        generated(lm, speculation="lookup")
    small = make_small_lm(make_backbone(num_layers=1, vocabulary_size=40))
    with raises(ValueError, "40 tokens", "60", "vocabulary"):
        generated(lm, speculation=DraftModel(small))
    lm.compile(sampler="beam")
    with raises(ValueError, "BeamSampler", "`speculation`"):
        generated(lm, speculation=PromptLookup())
