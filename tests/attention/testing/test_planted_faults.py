"""The conformance kit finds each mistake, and names the check that shows it."""

import functools

import keras
import pytest

from attention import MultiHeadAttention
from attention.testing import ConformanceError, check_cached_layer, check_cached_model
from attention.testing.checking import CHECKS
from tests.planted_faults import Attend, Leak

pytestmark = pytest.mark.same_everywhere

SIZES = {"hidden_dim": 8, "max_length": 12}
ROTARY, BIAS = {"rotary": True}, {"bias": True}

# The fault, the layer it is planted in, the check that must name it, and a part
# of the message that leads to the mistake.
FAULTS = [
    ("rotary offset of queries", ROTARY, "prefill_and_steps", "is wrong already"),
    ("rotary offset of later calls", ROTARY, "prefill_and_steps", "is right"),
    ("a mask aligned top left", {}, "prefill_and_steps", "is right"),
    ("a bias from the length of the query", BIAS, "prefill_and_steps", "is right"),
    ("a window wrong by one", {"window": 4}, "prefill_and_steps", "Wrong positions"),
    ("the value is not written", {}, "prefill_and_steps", "cache['value'] was never"),
    ("the cache's dtype drifts", {}, "cache", "bfloat16"),
    ("rows mixed up by a transpose", {}, "rows", "Row 0 was changed"),
    ("state on the layer", {}, "state", "attributes changed meanwhile: `seen`"),
    (
        "a config that forgets an argument",
        {"window": 5},
        "config",
        "leaves out `window`",
    ),
    ("a mask of -inf", {}, "masked_rows", "nan"),
    # Of our own invention.
    ("a cache that isn't batch first", {}, "cache", "first axis"),
    ("sees the next token", {}, "causality", "off by one"),
    ("a mean over the sequence", {}, "causality", "averaged"),
    ("one index for all rows", {}, "positions", "by its own entry"),
    ("unfilled slots are attended", {}, "prefill_and_steps", "not filled yet"),
    ("a scale from the capacity", {}, "capacity", "from the size of the cache"),
    ("a write that is moved to fit", {}, "capacity", "reach past the end"),
    ("a write that adds to its slot", {}, "rewind", "a write replaces what is in"),
    ("a mask that overflows float16", {}, "low_precision", "mixed_float16"),
    ("the value's gradient stops", {}, "gradients", "value/kernel"),
    ("a table that is no weight", {}, "config", "not kept as a weight"),
    ("a weight that is not saved", {}, "saving", "`.keras` file"),
]
RECURRENT_FAULTS = [
    ("a token is processed twice", "prefill_and_steps", "is processed twice"),
    ("a padded token enters the state", "padding", "they are seen"),
    ("a mean over the batch", "rows", "mean or a norm over the batch"),
    ("a state that says it gives tokens back", "rewind", "they were not taken back"),
]
LAST = ("low_precision", "gradients", "config", "saving")


def named(make, check, part, run=check_cached_layer, **kwargs):
    """All checks are run, and this one is the first that fails."""
    with pytest.raises(ConformanceError) as error:
        run(make, **kwargs)
    message = str(error.value)
    assert error.value.check == check, message
    assert message.startswith(f"Check '{check}' failed.")
    assert part in message, message
    return message


@pytest.mark.slow
@pytest.mark.parametrize("fault, settings, check, part", FAULTS, ids=lambda x: str(x))
def test_faults_of_attention(fault, settings, check, part):
    make = functools.partial(Attend, fault=fault, **settings)
    only = None
    if keras.config.backend() == "jax" and check in LAST:
        only = check  # what comes before holds on the other backends, too
    named(make, check, part, checks=only, **SIZES)


@pytest.mark.skipif(keras.config.backend() == "torch", reason="compiles nothing")
def test_a_fault_of_what_is_compiled():
    make = functools.partial(Attend, fault="NumPy on an index")
    named(make, "compiled", "compiled", checks="compiled", **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("fault, check, part", RECURRENT_FAULTS)
def test_faults_of_a_recurrence(fault, check, part):
    named(lambda: Leak(fault), check, part, **SIZES)


@pytest.mark.skipif(keras.config.backend() != "torch", reason="only torch's change")
def test_a_cache_that_is_changed_in_place():
    make = functools.partial(Attend, fault="the cache is changed in place")
    named(make, "state", "changed the cache it was given", **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: Attend(rotary=True), lambda: Attend(bias=True, window=5), Leak]
)
def test_the_same_layers_without_a_fault(make):
    report = check_cached_layer(make, **SIZES)
    # Their `call` has no `segment_ids`.
    left_out = {"packing"}
    if keras.config.backend() == "torch":
        left_out.add("compiled")
    assert set(CHECKS) - set(report) == left_out
    for check, difference in report.items():
        bound = 0.1 if check == "low_precision" else 1e-3
        assert 0 <= difference < bound, (check, difference)


def model(layer):
    inputs = keras.Input((None, 8))
    x = MultiHeadAttention(2)(inputs)
    return keras.Model(inputs, keras.layers.Dense(4)(layer(x)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "padding, check", [("causal", "prefill_and_steps"), ("same", "causality")]
)
def test_an_uncached_layer_that_mixes_along_the_sequence(padding, check):
    def make():
        return model(keras.layers.Conv1D(8, 3, padding=padding))

    named(make, check, "model", run=check_cached_model, max_length=12)
