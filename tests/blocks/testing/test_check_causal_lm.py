"""The check of generation holds for our models; `test_causal_lm_faults` has others."""

import numpy as np
import pytest

from blocks import CausalLM
from blocks.testing.causal_lm import CHECKS, check_causal_lm
from tests.helpers import raises
from tests.models import SMALL_SIZES, EagerLM, make_backbone, make_variant


@pytest.mark.slow
def test_all_checks_hold():
    report = check_causal_lm(
        lambda: CausalLM(make_variant("leak"), generation_sizes=SMALL_SIZES)
    )
    assert list(report) == list(CHECKS)
    assert max(report.values()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        # Many a near-tie.
        ("gqa", {"dtype": "mixed_bfloat16"}),
        # Short prompts only.
        ("mha", {"max_sequence_length": 12}),
        ("rotary", {}),
    ],
)
def test_all_checks_hold_uncompiled(variant, overrides):
    report = check_causal_lm(
        lambda: EagerLM(make_variant(variant, num_layers=1, **overrides))
    )
    assert list(report) == list(CHECKS)


@pytest.mark.slow
def test_a_model_of_zeros_is_made_lively():
    def make():
        lm = EagerLM(make_backbone(num_layers=1))
        for weight in lm.trainable_weights:
            weight.assign(np.zeros(weight.shape))
        return lm

    check_causal_lm(make, checks=["lengths", "greedy"], seed=3)


@pytest.mark.slow
def test_prompts_and_sizes_of_ones_own():
    report = check_causal_lm(
        lambda: EagerLM(make_backbone(num_layers=1)),
        prompts=[np.array([1, 2, 3]), range(9)],
        max_new_tokens=3,
        checks=iter(["beam", "greedy"]),
        num_beams=2,
    )
    assert list(report) == ["greedy", "beam"]


PROMPTS = "list of prompts, each a list of token ids"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompts": "text"}, TypeError, PROMPTS),
        ({"prompts": [1, 2]}, TypeError, PROMPTS),
        ({"prompts": [[1.5]]}, TypeError, PROMPTS),
        ({"prompts": []}, ValueError, "at least one"),
        ({"prompts": [[1], []]}, ValueError, "at least one"),
        ({"prompts": [[1, 60]]}, ValueError, "vocabulary of 60 tokens"),
        ({"prompts": [[1] * 57]}, ValueError, "a prompt may have 56"),
        ({"max_new_tokens": 64}, ValueError, "Pass a smaller `max_new_tokens`"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` must be a positive"),
        ({"num_beams": 60}, ValueError, "smaller than the vocabulary"),
        ({"checks": ["greed"]}, ValueError, "lengths, greedy, ragged_batch"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with raises(error, words):
        check_causal_lm(lambda: EagerLM(make_backbone(num_layers=1)), **arguments)


class NoNewTokens(CausalLM):
    def generate(self, inputs, max_length=None, stop_token_ids=None):
        return inputs


def test_what_is_no_causal_lm():
    with raises(TypeError, "function without arguments"):
        check_causal_lm(EagerLM(make_backbone()))
    with raises(TypeError, "must return a causal language model"):
        check_causal_lm(make_backbone)
    with raises(TypeError, "does not take max_new_tokens"):
        check_causal_lm(lambda: NoNewTokens(make_backbone()))
