"""The check of generation finds what is wrong in models that are right otherwise."""

import keras_hub
import numpy as np
import pytest
from keras import ops

from attention import MultiHeadAttention
from attention.testing import ConformanceError
from blocks.generation import engine
from blocks.testing.causal_lm import check_causal_lm
from tests.models import (
    RAGGED,
    EagerLM,
    MultiQueryBackbone,
    make_backbone,
    prompts,
    rows_of,
)

pytestmark = pytest.mark.slow


class Faulty(EagerLM):
    """A right model; its subclasses are wrong in one thing."""

    @staticmethod
    def make():
        return make_backbone(num_layers=1)


class OneTooMany(Faulty):
    def generate(self, inputs, max_new_tokens=None, **kwargs):
        more = max_new_tokens and max_new_tokens + 1
        return super().generate(inputs, max_new_tokens=more, **kwargs)


class PromptShifter(Faulty):
    def generate(self, inputs, **kwargs):
        outputs = super().generate(inputs, **kwargs)
        return prompts([[0, *row] for row in rows_of(outputs)])


class LimitOfTheLongest(Faulty):
    """Gives each row as many new tokens as the longest has room for."""

    def generate(self, inputs, max_length=None, **kwargs):
        if max_length:
            longest = inputs["padding_mask"].sum(axis=1).max()
            kwargs["max_new_tokens"] = int(max_length - longest)
        return super().generate(inputs, **kwargs)


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


class ForgetfulBackbone(MultiQueryBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return ForgetsItsPlace(self.num_heads)


class ForgetfulLM(Faulty):
    @staticmethod
    def make():
        return make_backbone(ForgetfulBackbone)


class LastColumn(Faulty):
    """Reads the prompt without its last token."""

    def generate(self, inputs, **kwargs):
        lengths = inputs["padding_mask"].sum(axis=1)
        if lengths.min() < 2 or "max_new_tokens" not in kwargs:
            return super().generate(inputs, **kwargs)
        rows = rows_of(inputs)
        outputs = super().generate(prompts([row[:-1] for row in rows]), **kwargs)
        new = [out[len(row) - 1 :] for out, row in zip(rows_of(outputs), rows)]
        return prompts([row + more for row, more in zip(rows, new)])


class PaddingReader(Faulty):
    """Reads padding as if it were tokens, as a loop without a mask does."""

    def generate(self, inputs, **kwargs):
        if "max_length" in kwargs:
            return super().generate(inputs, **kwargs)
        rows, width = rows_of(inputs), inputs["token_ids"].shape[1]
        filled = {**inputs, "padding_mask": np.ones_like(inputs["padding_mask"])}
        outputs = super().generate(filled, **kwargs)
        pairs = zip(rows, rows_of(outputs))
        return prompts([row + out[width:] for row, out in pairs])


class EndlessRow(Faulty):
    """Does not see the stop token in the row that ends first."""

    def generate(self, inputs, stop_token_ids=None, **kwargs):
        outputs = super().generate(inputs, stop_token_ids=stop_token_ids, **kwargs)
        if not stop_token_ids:
            return outputs
        rows = rows_of(outputs)
        free = rows_of(super().generate(inputs, stop_token_ids=None, **kwargs))
        first = min(range(len(rows)), key=lambda i: len(rows[i]) - len(free[i]))
        return prompts([*rows[:first], free[first], *rows[first + 1 :]])


class AllEndTogether(Faulty):
    """Ends all rows as soon as one has ended."""

    def generate(self, inputs, **kwargs):
        outputs = rows_of(super().generate(inputs, **kwargs))
        pairs = list(zip(outputs, rows_of(inputs)))
        if "max_length" not in kwargs:
            shortest = min(len(out) - len(row) for out, row in pairs)
            outputs = [out[: len(row) + shortest] for out, row in pairs]
        return prompts(outputs)


class Stale(Faulty):
    """Keeps the weights of the first `generate` after `compile`."""

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        self.constants = None

    def generate(self, inputs, **kwargs):
        values = self.get_weights()
        self.constants = self.constants or tuple(values)
        self.set_weights(self.constants)
        outputs = super().generate(inputs, **kwargs)
        self.set_weights(values)
        return outputs


class GreedyInsteadOf(Faulty):
    """Ignores the sampler, if it is one of some kinds."""

    kinds = ()

    def generate(self, inputs, **kwargs):
        sampler = self.sampler
        if isinstance(sampler, self.kinds):
            self.sampler = keras_hub.samplers.GreedySampler()
        outputs = super().generate(inputs, **kwargs)
        self.sampler = sampler
        return outputs


class NoBeams(GreedyInsteadOf):
    kinds = keras_hub.samplers.BeamSampler


class OnlyBuiltInSamplers(GreedyInsteadOf):
    def generate(self, inputs, **kwargs):
        known = hasattr(keras_hub.samplers, type(self.sampler).__name__)
        self.kinds = () if known else keras_hub.samplers.Sampler
        return super().generate(inputs, **kwargs)


class Flat(Faulty):
    """Chooses any token where top-k was asked for."""

    def generate(self, inputs, **kwargs):
        if isinstance(self.sampler, keras_hub.samplers.TopKSampler):
            self.sampler.k = self.backbone.vocabulary_size
            self.sampler.temperature = 5.0
        return super().generate(inputs, **kwargs)


class NoSeed(Faulty):
    calls = 0

    def generate(self, inputs, **kwargs):
        NoSeed.calls += 1
        if hasattr(self.sampler, "seed_generator"):
            self.sampler.seed_generator.state.assign([NoSeed.calls, 7])
        return super().generate(inputs, **kwargs)


class OneRowOnly(Faulty):
    def generate(self, inputs, **kwargs):
        if len(inputs["token_ids"]) > 1:
            raise RuntimeError("no batches")
        return super().generate(inputs, **kwargs)


class NotADict(Faulty):
    def generate(self, inputs, **kwargs):
        return super().generate(inputs, **kwargs)["token_ids"]


class OutOfVocabulary(Faulty):
    def generate(self, inputs, **kwargs):
        outputs = super().generate(inputs, **kwargs)
        outputs["token_ids"][0, 5] = 1000
        return outputs


# The class of models, the check that must find what is wrong with it, and parts of
# the message that lead to the mistake.
FAULTS = [
    (OneTooMany, "lengths", ["row 0 (a prompt of 3 tokens) must get 5 new", "got 6"]),
    (PromptShifter, "lengths", ["Row 0 has the prompt"]),
    (LimitOfTheLongest, "lengths", ["`max_length=9`"]),
    (OneRowOnly, "lengths", ["raised RuntimeError when it was asked to `generate("]),
    (NotADict, "lengths", ["must return a dict of `token_ids` and `padding_mask`"]),
    (OutOfVocabulary, "lengths", ["token 1000, which is outside of the vocabulary of"]),
    (
        ForgetfulLM,
        "greedy",
        [
            "run `check_cached_model` on the backbone",
            "Checks that held before it: lengths.",
        ],
    ),
    (
        LastColumn,
        "greedy",
        [
            "The first new token is wrong already",
            "the prefix without its last token",
            "step 0 (after a prefix of 3 tokens)",
        ],
    ),
    (
        PaddingReader,
        "ragged_batch",
        ["Only rows that are shorter than the longest are", "padding read as tokens"],
    ),
    (EndlessRow, "stop_tokens", ["Each row needs its own flag of being done"]),
    (AllEndTogether, "stop_tokens", ["Did it end because another row did"]),
    (Stale, "weights", ["exactly those of the earlier weights"]),
    (NoBeams, "beam", ["This is the greedy continuation"]),
    (OnlyBuiltInSamplers, "own_sampler", ["the sampler was not used"]),
    (Flat, "sampling", ["must choose one of the 5 likeliest"]),
    (NoSeed, "sampling", ["must give the same tokens"]),
]


@pytest.mark.parametrize(
    "cls, check, words", FAULTS, ids=[x[0].__name__ for x in FAULTS]
)
def test_each_fault_is_found_and_named(cls, check, words):
    """All checks are run, and this one is the first that fails."""
    with pytest.raises(ConformanceError) as raised:
        check_causal_lm(
            lambda: cls(cls.make()),
            prompts=RAGGED,
            max_new_tokens=5,
            checks=check if cls is LastColumn else None,
        )
    message = str(raised.value)
    assert message.startswith(f"Check '{check}' failed. ")
    for word in words:
        assert word in message


def test_rows_in_lockstep_are_found(monkeypatch):
    scope = engine.CacheScope

    def lockstep(cache, index, *others):
        return scope(cache, ops.max(index) * ops.ones_like(index), *others)

    monkeypatch.setattr(engine, "CacheScope", lockstep)
    test_each_fault_is_found_and_named(Faulty, "ragged_batch", ["at their positions"])
