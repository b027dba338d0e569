"""The check of generation finds what is wrong in models that are right otherwise."""

import keras_hub
import numpy as np
import pytest
from keras import ops

from attention import MultiHeadAttention
from attention.testing import ConformanceError
from blocks import CustomBackbone
from blocks.generation import engine
from blocks.testing.causal_lm import check_causal_lm
from tests.helpers import raises
from tests.models import RAGGED, EagerLM, make_backbone, prompts, rows_of

pytestmark = pytest.mark.slow


class Faulty(EagerLM):
    """A right model, but for what a function makes of its `generate`."""

    def __init__(self, backbone, fault):
        super().__init__(backbone)
        self.fault = fault
        self.first_weights = None

    def generate(self, inputs, **kwargs):
        return self.fault(self, super().generate, inputs, **kwargs)


def one_too_many(lm, generate, inputs, max_new_tokens=None, **kwargs):
    more = max_new_tokens and max_new_tokens + 1
    return generate(inputs, max_new_tokens=more, **kwargs)


def prompt_shifter(lm, generate, inputs, **kwargs):
    return prompts([[0, *row] for row in rows_of(generate(inputs, **kwargs))])


def limit_of_the_longest(lm, generate, inputs, max_length=None, **kwargs):
    """Gives each row as many new tokens as the longest has room for."""
    if max_length:
        longest = inputs["padding_mask"].sum(axis=1).max()
        kwargs["max_new_tokens"] = int(max_length - longest)
    return generate(inputs, **kwargs)


def last_column(lm, generate, inputs, **kwargs):
    """Reads the prompt without its last token."""
    rows = rows_of(inputs)
    if min(map(len, rows)) < 2 or "max_new_tokens" not in kwargs:
        return generate(inputs, **kwargs)
    outputs = rows_of(generate(prompts([row[:-1] for row in rows]), **kwargs))
    return prompts([row + out[len(row) - 1 :] for out, row in zip(outputs, rows)])


def padding_reader(lm, generate, inputs, **kwargs):
    """Reads padding as if it were tokens, as a loop without a mask does."""
    if "max_length" in kwargs:
        return generate(inputs, **kwargs)
    rows, width = rows_of(inputs), inputs["token_ids"].shape[1]
    filled = {**inputs, "padding_mask": np.ones_like(inputs["padding_mask"])}
    outputs = rows_of(generate(filled, **kwargs))
    return prompts([row + out[width:] for row, out in zip(rows, outputs)])


def endless_row(lm, generate, inputs, stop_token_ids=None, **kwargs):
    """Does not see the stop token in the row that ends first."""
    outputs = generate(inputs, stop_token_ids=stop_token_ids, **kwargs)
    if not stop_token_ids:
        return outputs
    rows = rows_of(outputs)
    free = rows_of(generate(inputs, stop_token_ids=None, **kwargs))
    first = min(range(len(rows)), key=lambda i: len(rows[i]) - len(free[i]))
    return prompts([*rows[:first], free[first], *rows[first + 1 :]])


def all_end_together(lm, generate, inputs, **kwargs):
    """Ends all rows as soon as one has ended."""
    outputs = rows_of(generate(inputs, **kwargs))
    pairs = list(zip(outputs, rows_of(inputs)))
    if "max_length" not in kwargs:
        shortest = min(len(out) - len(row) for out, row in pairs)
        outputs = [out[: len(row) + shortest] for out, row in pairs]
    return prompts(outputs)


def stale(lm, generate, inputs, **kwargs):
    """Keeps the weights of the first `generate` after `compile`."""
    values = lm.get_weights()
    if not lm.first_weights or lm.first_weights[0] is not lm.sampler:
        lm.first_weights = (lm.sampler, tuple(values))
    lm.set_weights(lm.first_weights[1])
    outputs = generate(inputs, **kwargs)
    lm.set_weights(values)
    return outputs


def greedy_instead_of(is_ignored):
    def fault(lm, generate, inputs, **kwargs):
        sampler = lm.sampler
        if is_ignored(sampler):
            lm.sampler = keras_hub.samplers.GreedySampler()
        outputs = generate(inputs, **kwargs)
        lm.sampler = sampler
        return outputs

    return fault


def is_beam(sampler):
    return isinstance(sampler, keras_hub.samplers.BeamSampler)


def is_own(sampler):
    return not hasattr(keras_hub.samplers, type(sampler).__name__)


def flat(lm, generate, inputs, **kwargs):
    """Chooses any token where top-k was asked for."""
    if isinstance(lm.sampler, keras_hub.samplers.TopKSampler):
        lm.sampler.k = lm.backbone.vocabulary_size
        lm.sampler.temperature = 5.0
    return generate(inputs, **kwargs)


def no_seed(lm, generate, inputs, **kwargs):
    if hasattr(lm.sampler, "seed_generator"):
        state = np.random.default_rng().integers(0, 2**31, 2)
        lm.sampler.seed_generator.state.assign(state)
    return generate(inputs, **kwargs)


def one_row_only(lm, generate, inputs, **kwargs):
    if len(inputs["token_ids"]) > 1:
        raise RuntimeError("no batches")
    return generate(inputs, **kwargs)


def not_a_dict(lm, generate, inputs, **kwargs):
    return generate(inputs, **kwargs)["token_ids"]


def out_of_vocabulary(lm, generate, inputs, **kwargs):
    outputs = generate(inputs, **kwargs)
    outputs["token_ids"][0, 5] = 1000
    return outputs


def check_is_the_first_to_fail(make, check, words):
    """All checks are run, and this one is the first that fails."""
    with raises(ConformanceError, f"Check '{check}' failed. ", *words):
        check_causal_lm(make, prompts=RAGGED, max_new_tokens=5)


# The fault, the check that must find it, and parts of the message that lead to it.
FAULTS = [
    (one_too_many, "lengths", ["row 0 (a prompt of 3 tokens) must get 5 new", "got 6"]),
    (prompt_shifter, "lengths", ["Row 0 has the prompt"]),
    (limit_of_the_longest, "lengths", ["`max_length=9`"]),
    (one_row_only, "lengths", ["raised RuntimeError when it was asked to `generate("]),
    (not_a_dict, "lengths", ["must return a dict of `token_ids` and `padding_mask`"]),
    (out_of_vocabulary, "lengths", ["token 1000, which is outside of the vocabulary"]),
    (
        last_column,
        "greedy",
        [
            "The first new token is wrong already",
            "the prefix without its last token",
            "step 0 (after a prefix of 3 tokens)",
        ],
    ),
    (
        padding_reader,
        "ragged_batch",
        ["Only rows that are shorter than the longest are", "padding read as tokens"],
    ),
    (endless_row, "stop_tokens", ["Each row needs its own flag of being done"]),
    (all_end_together, "stop_tokens", ["Did it end because another row did"]),
    (stale, "weights", ["exactly those of the earlier weights"]),
    (greedy_instead_of(is_beam), "beam", ["This is the greedy continuation"]),
    (greedy_instead_of(is_own), "own_sampler", ["the sampler was not used"]),
    (flat, "sampling", ["must choose one of the 5 likeliest"]),
    (no_seed, "sampling", ["must give the same tokens"]),
]


@pytest.mark.parametrize("fault, check, words", FAULTS)
def test_each_fault_is_found_and_named(fault, check, words):
    check_is_the_first_to_fail(
        lambda: Faulty(make_backbone(num_layers=1), fault), check, words
    )


class ForgetsItsPlace(MultiHeadAttention):
    """A decode form that takes each token for the first."""

    def call(self, query, padding_mask=None, cache=None, cache_update_index=None):
        if cache is not None:
            cache_update_index = 0
        return super().call(
            query,
            padding_mask=padding_mask,
            cache=cache,
            cache_update_index=cache_update_index,
        )


class ForgetfulBackbone(CustomBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return ForgetsItsPlace(self.num_heads)


def test_a_decode_form_that_differs_is_found():
    words = ("run `check_cached_model` on", "Checks that held before it: lengths.")
    check_is_the_first_to_fail(
        lambda: EagerLM(make_backbone(ForgetfulBackbone)), "greedy", words
    )


def test_rows_in_lockstep_are_found(monkeypatch):
    scope = engine.CacheScope

    def lockstep(cache, index, *others):
        return scope(cache, ops.max(index) * ops.ones_like(index), *others)

    monkeypatch.setattr(engine, "CacheScope", lockstep)
    check_is_the_first_to_fail(
        lambda: EagerLM(make_backbone(num_layers=1)),
        "ragged_batch",
        ["at their positions"],
    )
