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


def failure(cls, backbone=None, **kwargs):
    """The message of the check that fails for a class of models."""

    def make():
        return cls(backbone() if backbone else make_backbone(num_layers=1))

    with pytest.raises(ConformanceError) as raised:
        check_causal_lm(make, **{"prompts": RAGGED, "max_new_tokens": 5, **kwargs})
    message = str(raised.value)
    assert message.startswith(f"Check '{raised.value.check}' failed. ")
    return raised.value.check, message


class OneTooMany(EagerLM):
    def generate(self, inputs, max_new_tokens=None, **kwargs):
        more = max_new_tokens and max_new_tokens + 1
        return super().generate(inputs, max_new_tokens=more, **kwargs)


class PromptShifter(EagerLM):
    def generate(self, inputs, **kwargs):
        outputs = super().generate(inputs, **kwargs)
        return prompts([[0, *row] for row in rows_of(outputs)])


class LimitOfTheLongest(EagerLM):
    """Gives each row as many new tokens as the longest has room for."""

    def generate(self, inputs, max_length=None, **kwargs):
        if max_length:
            longest = inputs["padding_mask"].sum(axis=1).max()
            kwargs["max_new_tokens"] = int(max_length - longest)
        return super().generate(inputs, **kwargs)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (OneTooMany, "row 0 (a prompt of 3 tokens) must get 5 new tokens. It got 6"),
        (PromptShifter, "Row 0 has the prompt"),
        (LimitOfTheLongest, "`max_length=9`"),
    ],
)
def test_wrong_lengths(cls, words):
    check, message = failure(cls)
    assert check == "lengths"
    assert words in message


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


def test_a_wrong_decode_form():
    check, message = failure(EagerLM, lambda: make_backbone(ForgetfulBackbone))
    assert check == "greedy"
    assert "run `check_cached_model` on the backbone" in message
    assert "Checks that held before it: lengths." in message


class LastColumn(EagerLM):
    """Reads the prompt without its last token."""

    def generate(self, inputs, **kwargs):
        lengths = inputs["padding_mask"].sum(axis=1)
        if lengths.min() < 2 or "max_new_tokens" not in kwargs:
            return super().generate(inputs, **kwargs)
        rows = rows_of(inputs)
        outputs = super().generate(prompts([row[:-1] for row in rows]), **kwargs)
        new = [out[len(row) - 1 :] for out, row in zip(rows_of(outputs), rows)]
        return prompts([row + more for row, more in zip(rows, new)])


def test_a_wrong_prefill():
    check, message = failure(LastColumn, checks=["greedy"])
    assert check == "greedy"
    assert "The first new token is wrong already" in message
    assert "the prefix without its last token" in message
    assert "step 0 (after a prefix of 3 tokens)" in message


class PaddingReader(EagerLM):
    """Reads padding as if it were tokens, as a loop without a mask does."""

    def generate(self, inputs, **kwargs):
        if "max_length" in kwargs:
            return super().generate(inputs, **kwargs)
        rows, width = rows_of(inputs), inputs["token_ids"].shape[1]
        filled = {**inputs, "padding_mask": np.ones_like(inputs["padding_mask"])}
        outputs = super().generate(filled, **kwargs)
        pairs = zip(rows, rows_of(outputs))
        return prompts([row + out[width:] for row, out in pairs])


def test_padding_that_is_read():
    check, message = failure(PaddingReader)
    assert check == "ragged_batch"
    assert "Only rows that are shorter than the longest are wrong" in message
    assert "padding read as tokens" in message


def test_rows_in_lockstep(monkeypatch):
    scope = engine.CacheScope

    def lockstep(cache, index, *others):
        return scope(cache, ops.max(index) * ops.ones_like(index), *others)

    monkeypatch.setattr(engine, "CacheScope", lockstep)
    check, message = failure(EagerLM)
    assert check == "ragged_batch"
    assert "at their positions" in message


class EndlessRow(EagerLM):
    """Does not see the stop token in the row that ends first."""

    def generate(self, inputs, stop_token_ids=None, **kwargs):
        outputs = super().generate(inputs, stop_token_ids=stop_token_ids, **kwargs)
        if not stop_token_ids:
            return outputs
        rows = rows_of(outputs)
        free = rows_of(super().generate(inputs, stop_token_ids=None, **kwargs))
        first = min(range(len(rows)), key=lambda i: len(rows[i]) - len(free[i]))
        return prompts([*rows[:first], free[first], *rows[first + 1 :]])


class AllEndTogether(EagerLM):
    """Ends all rows as soon as one has ended."""

    def generate(self, inputs, **kwargs):
        outputs = rows_of(super().generate(inputs, **kwargs))
        pairs = list(zip(outputs, rows_of(inputs)))
        if "max_length" not in kwargs:
            shortest = min(len(out) - len(row) for out, row in pairs)
            outputs = [out[: len(row) + shortest] for out, row in pairs]
        return prompts(outputs)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (EndlessRow, "Each row needs its own flag of being done"),
        (AllEndTogether, "Did it end because another row did"),
    ],
)
def test_wrong_ends(cls, words):
    check, message = failure(cls)
    assert check == "stop_tokens"
    assert words in message


class Stale(EagerLM):
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


def test_stale_weights():
    check, message = failure(Stale)
    assert check == "weights"
    assert "exactly those of the earlier weights" in message


class GreedyInsteadOf(EagerLM):
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


class Flat(EagerLM):
    """Chooses any token where top-k was asked for."""

    def generate(self, inputs, **kwargs):
        if isinstance(self.sampler, keras_hub.samplers.TopKSampler):
            self.sampler.k = self.backbone.vocabulary_size
            self.sampler.temperature = 5.0
        return super().generate(inputs, **kwargs)


class NoSeed(EagerLM):
    calls = 0

    def generate(self, inputs, **kwargs):
        NoSeed.calls += 1
        if hasattr(self.sampler, "seed_generator"):
            self.sampler.seed_generator.state.assign([NoSeed.calls, 7])
        return super().generate(inputs, **kwargs)


@pytest.mark.parametrize(
    ("cls", "check", "words"),
    [
        (NoBeams, "beam", "This is the greedy continuation"),
        (OnlyBuiltInSamplers, "own_sampler", "the sampler was not used"),
        (Flat, "sampling", "must choose one of the 5 likeliest"),
        (NoSeed, "sampling", "must give the same tokens"),
    ],
)
def test_samplers_that_are_not_obeyed(cls, check, words):
    found, message = failure(cls)
    assert found == check
    assert words in message


class OneRowOnly(EagerLM):
    def generate(self, inputs, **kwargs):
        if len(inputs["token_ids"]) > 1:
            raise RuntimeError("no batches")
        return super().generate(inputs, **kwargs)


class NotADict(EagerLM):
    def generate(self, inputs, **kwargs):
        return super().generate(inputs, **kwargs)["token_ids"]


class OutOfVocabulary(EagerLM):
    def generate(self, inputs, **kwargs):
        outputs = super().generate(inputs, **kwargs)
        outputs["token_ids"][0, 5] = 1000
        return outputs


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (OneRowOnly, "raised RuntimeError when it was asked to `generate("),
        (NotADict, "must return a dict of `token_ids` and `padding_mask`"),
        (OutOfVocabulary, "token 1000, which is outside of the vocabulary of 60"),
    ],
)
def test_what_can_not_be_compared(cls, words):
    check, message = failure(cls, checks="lengths")
    assert check == "lengths"
    assert words in message
