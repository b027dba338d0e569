"""Speculative decoding: the same outputs, from fewer steps."""

import keras_hub
import numpy as np
import pytest

from blocks import DraftModel, PromptLookup, Speculation
from tests.helpers import raises, slow
from tests.hybrid import HybridBackbone
from tests.models import (
    RAGGED,
    RotaryBackbone,
    brute_force_greedy,
    make_backbone,
    make_small_lm,
    prompts,
    randomize,
    rows_of,
)

BACKBONES = {
    "learned": lambda **kwargs: make_backbone(**kwargs),
    "rotary": lambda **kwargs: make_backbone(
        RotaryBackbone, learned_positions=False, **kwargs
    ),
    "hybrid": lambda **kwargs: make_backbone(HybridBackbone, **kwargs),
}


def other_model(kind="learned"):
    """A model that guesses wrong most of the time."""
    backbone = BACKBONES[kind](num_layers=2)
    randomize(backbone, seed=5)
    return make_small_lm(backbone)


class Scripted(Speculation):
    """Guesses what it was told would come, but for every `wrong`-th token."""

    def __init__(self, expected, num_tokens, wrong=0):
        super().__init__(num_tokens)
        self.expected, self.wrong, self.rounds = expected, wrong, 0

    def propose(self, memory, rows):
        self.rounds += 1
        guesses = []
        for row, expected in zip(rows, self.expected):
            guess = np.array(expected[len(row) : len(row) + self.num_tokens], "int32")
            places = np.arange(len(row), len(row) + len(guess))
            if self.wrong:
                guess = np.where(places % self.wrong == 0, (guess + 1) % 60, guess)
            guesses.append(guess if len(row) else guess[:0])
        return guesses


@pytest.mark.parametrize("kind", [slow("learned"), "rotary", "hybrid"])
def test_whatever_is_guessed_the_output_is_the_same(kind):
    lm = make_small_lm(BACKBONES[kind](num_layers=2 if kind == "hybrid" else 1))
    options = {"stop_token_ids": None, "max_new_tokens": 12}
    expected = rows_of(lm.generate(prompts(RAGGED), **options))
    limits = [len(row) + 12 for row in RAGGED]
    assert expected == brute_force_greedy(lm, RAGGED, limits)
    right, half = Scripted(expected, 3), Scripted(expected, 3, wrong=3)
    guesses = {
        "right": right,
        "some wrong": half,
        "all wrong": Scripted(expected, 3, wrong=1),
        "lookup": PromptLookup(3),
    }
    if kind == "learned":
        guesses["itself"] = DraftModel(lm, 3)
        guesses["recurrent"] = DraftModel(other_model("hybrid"), 3)
    if kind == "hybrid":
        guesses["another"] = DraftModel(other_model(), 3)
    for name, speculation in guesses.items():
        found = rows_of(
            lm.generate(prompts(RAGGED), **options, speculation=speculation)
        )
        assert found == expected, name
    # Twelve tokens: one from the prompt, and up to four from each step.
    assert right.rounds == 3
    assert right.rounds < half.rounds < 11


@pytest.mark.xla
def test_stop_tokens_within_a_guess():
    lm = make_small_lm(make_backbone())
    whole = rows_of(
        lm.generate(prompts(RAGGED), stop_token_ids=None, max_new_tokens=12)
    )
    stops = [whole[0][6], whole[1][11]]
    options = {"stop_token_ids": stops, "max_new_tokens": 12}
    expected = rows_of(lm.generate(prompts(RAGGED), **options))
    assert len({len(row) for row in expected}) > 1
    for speculation in (Scripted(whole, 4), PromptLookup(4), DraftModel(lm, 4)):
        found = lm.generate(prompts(RAGGED), **options, speculation=speculation)
        assert rows_of(found) == expected


def test_limits_of_rows_and_of_positions():
    lm = make_small_lm(make_backbone(max_sequence_length=16))
    small = make_small_lm(make_backbone(max_sequence_length=12, num_layers=1))
    options = {"stop_token_ids": None, "max_length": 16}
    # The last row is at its limit from the start.
    rows = [*RAGGED, list(range(16))]
    expected = rows_of(lm.generate(prompts(rows), **options))
    guesses = (Scripted(expected, 5), PromptLookup(5), DraftModel(small, 5))
    for speculation in (*guesses, DraftModel(other_model("hybrid"), 2)):
        found = lm.generate(prompts(rows), **options, speculation=speculation)
        assert rows_of(found) == expected
    assert expected[:3] == brute_force_greedy(lm, RAGGED, [16] * 3, width=16)


@pytest.mark.parametrize("kind", [slow("learned"), "rotary"])
def test_more_guesses_than_a_cache_has_room_for(kind):
    lm = other_model(kind)
    options = {"stop_token_ids": None, "max_new_tokens": 9}
    expected = rows_of(lm.generate(prompts(RAGGED), **options))
    for speculation in (Scripted(expected, 100), DraftModel(lm, 100)):
        found = lm.generate(prompts(RAGGED), **options, speculation=speculation)
        assert rows_of(found) == expected


def test_the_distribution_stays_the_same():
    """A draft that always says the same must not make that more likely."""
    lm = make_small_lm(make_backbone(num_layers=1))
    rows = [[1, 2, 3]] * 400

    class Always(Speculation):
        def propose(self, memory, rows):
            return [np.full((2,), favourite, "int32") for _ in rows]

    def counts(speculation):
        lm.compile(sampler=keras_hub.samplers.RandomSampler(temperature=4.0, seed=3))
        options = {"stop_token_ids": None, "max_new_tokens": 4, "strip_prompt": True}
        found = [
            rows_of(lm.generate(prompts(rows), **options, speculation=speculation))
            for _ in range(3)
        ]
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


def test_errors():
    lm = make_small_lm(make_backbone(num_layers=1))
    x = prompts(RAGGED)
    with raises(TypeError, "`model`", "CausalLM"):
        DraftModel(lm.backbone)
    with raises(ValueError, "`min_ngram`"):
        PromptLookup(max_ngram=1, min_ngram=2)
    with raises(TypeError, "`speculation`", "PromptLookup"):
        lm.generate(x, stop_token_ids=None, max_length=9, speculation="lookup")
    small = make_small_lm(make_backbone(num_layers=1, vocabulary_size=40))
    with raises(ValueError, "40 tokens", "60", "vocabulary"):
        lm.generate(x, stop_token_ids=None, max_length=9, speculation=DraftModel(small))
    lm.compile(sampler="beam")
    with raises(ValueError, "BeamSampler", "`speculation`"):
        lm.generate(x, stop_token_ids=None, max_length=9, speculation=PromptLookup())
