"""`return_key_value` and `SharedKeyValueAttention`: one producer, several readers."""

import functools

import keras
import numpy as np
import pytest

from attention import (
    AlibiBias,
    GroupedQueryAttention,
    RelativePositionBias,
    RotaryPosition,
    SharedKeyValueAttention,
)
from attention.positions.arithmetic import HIDDEN_POSITION
from attention.testing import check_cached_layer
from tests.helpers import (
    BATCH,
    LENGTH,
    ProducerAndReader,
    assert_close,
    built,
    ragged,
    raises,
    sample,
    secret,
    to_numpy,
)

pytestmark = pytest.mark.same_everywhere

SETTINGS = {
    "grouped": {},
    "plain": {"num_key_value_heads": 4},
    "one": {"num_key_value_heads": 1, "use_bias": False},
    "rotary": {"position": RotaryPosition},
    "alibi": {"position": AlibiBias},
    "t5": {"position": RelativePositionBias},
    "sizes": {"value_dim": 6, "key_dim": 8, "scale": 0.3},
}


def make_pair(name):
    """A producer, and a reader with its query and output weights."""
    producer, reader = (built(x) for x in layers(SETTINGS[name]))
    for part in ("query_dense", "output_dense"):
        getattr(reader, part).set_weights(getattr(producer, part).get_weights())
    if name == "t5":
        reader.position.set_weights(producer.position.get_weights())
    return producer, reader


def layers(settings, **kwargs):
    """Two layers, each with a position scheme of its own."""
    settings = {"num_heads": 4, "num_key_value_heads": 2, **settings, **kwargs}
    position = settings.pop("position", lambda: None)
    for cls in (GroupedQueryAttention, SharedKeyValueAttention):
        yield cls(**settings, position=position())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_reader_with_the_producers_weights_gives_its_outputs(name):
    producer, reader = make_pair(name)
    x = sample()
    outputs, key_value = producer(x, return_key_value=True)
    assert_close(outputs, producer(x))
    assert_close(reader(x, key_value), outputs)
    expected, scores = producer(x, return_attention_scores=True)
    outputs, reader_scores = reader(x, key_value, return_attention_scores=True)
    assert_close(outputs, expected)
    assert_close(reader_scores, scores)


class Pair(ProducerAndReader):
    """With the settings of this file."""

    def __init__(self, name, **options):
        super().__init__()
        self.settings = {**SETTINGS[name], **options}

    def build(self, inputs_shape):
        self.producer, self.reader = layers(self.settings, dtype=self.dtype_policy)
        for layer in (self.producer, self.reader):
            layer.build(inputs_shape)


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(Pair, "t5"),
        # Keys in slots of no order, and a bias by their positions.
        functools.partial(Pair, "alibi", window=4),
        *(functools.partial(Pair, name) for name in SETTINGS if name != "t5"),
    ],
)
@pytest.mark.slow
def test_a_reader_with_a_cache_equals_one_without(make):
    checks = ["chunks", "positions", "padding", "capacity"]
    check_cached_layer(make, max_length=9, checks=checks)


# === The keys and values handed over ===


def test_a_cache_is_handed_over_as_it_is():
    producer, _ = make_pair("grouped")
    x, cache = sample(), producer.create_cache(BATCH, 16)
    # The first tokens attend to each other, and so do those of a reader.
    (_, key_value), cache = producer(
        x[:, :4], cache=cache, cache_update_index=0, return_key_value=True
    )
    assert tuple(key_value["positions"].shape) == (BATCH, 4)
    (_, key_value), cache = producer(
        x[:, 4:], cache=cache, cache_update_index=4, return_key_value=True
    )
    assert tuple(key_value["key"].shape) == tuple(key_value["value"].shape)
    keys = np.swapaxes(to_numpy(cache["key"]), 2, 3)
    np.testing.assert_array_equal(to_numpy(key_value["key"]), keys)
    assert key_value["value"] is cache["value"]
    assert tuple(key_value["positions"].shape) == (BATCH, 16)
    assert keras.backend.standardize_dtype(key_value["positions"].dtype) == "int32"


def test_both_scores_and_keys():
    producer, _ = make_pair("grouped")
    x, cache = sample(), producer.create_cache(BATCH, LENGTH)
    both = {"return_attention_scores": True, "return_key_value": True}
    outputs, scores, key_value = producer(x, padding_mask=ragged(5, 12, 1), **both)
    assert tuple(scores.shape) == (BATCH, 4, LENGTH, LENGTH)
    assert tuple(key_value["key"].shape) == (BATCH, 2, LENGTH, 4)
    positions = np.where(ragged(5, 12, 1), np.arange(LENGTH), HIDDEN_POSITION)
    np.testing.assert_array_equal(to_numpy(key_value["positions"]), positions)
    (cached, *_), _ = producer(x, cache=cache, cache_update_index=0, **both)
    assert_close(cached[1], outputs[1])


def test_keys_of_another_source():
    producer, reader = make_pair("rotary")
    x, source = sample(), sample(length=5, seed=1)
    outputs, key_value = producer(x, source, return_key_value=True)
    assert tuple(key_value["key"].shape) == (BATCH, 2, 5, 4)
    assert_close(reader(x, key_value), outputs)


def test_attention_mask_counts_positions():
    producer, reader = make_pair("grouped")
    x = sample()
    mask = np.random.default_rng(0).random((BATCH, LENGTH, LENGTH)) < 0.6
    for given in (mask, mask[:1]):
        outputs, key_value = producer(x, attention_mask=given, return_key_value=True)
        assert_close(reader(x, key_value, attention_mask=given), outputs)
        given = {"attention_mask": given, "cache_update_index": 0}
        cached, _ = reader(x, key_value, cache=(), **given)
        assert_close(cached, outputs)


# === What can't be attended to ===


@pytest.fixture
def key_value():
    return {
        "key": secret(BATCH, 2, LENGTH, 4),
        "value": secret(BATCH, 2, LENGTH, 4),
        "positions": np.zeros((BATCH, LENGTH), "int32"),
    }


@pytest.mark.parametrize(
    "change, kind, parts",
    [
        (lambda kv: None, TypeError, ["key_value=None", "return_key_value=True"]),
        (lambda kv: kv["key"], TypeError, ["key_value=float32 tensor of shape"]),
        (lambda kv: (kv["key"], kv["value"]), TypeError, ["key_value=tuple("]),
        (lambda kv: {"key": kv["key"]}, ValueError, ["can't attend", "{'key': "]),
        (lambda kv: {**kv, "more": kv["key"]}, ValueError, ["'more'"]),
        (lambda kv: {**kv, "value": None}, TypeError, ["'value': None", "tensors"]),
        (
            lambda kv: {**kv, "positions": secret(BATCH, LENGTH)},
            TypeError,
            ["integers as positions"],
        ),
        (lambda kv: {**kv, "key": kv["key"][0]}, ValueError, ["do not fit"]),
        (lambda kv: {**kv, "key": kv["key"][:2]}, ValueError, ["(2, 2, 12, 4)"]),
        (lambda kv: {**kv, "value": kv["value"][:, :, :5]}, ValueError, ["12, 4", "5"]),
        (
            lambda kv: {**kv, "positions": kv["positions"][:, :5]},
            ValueError,
            [f"({BATCH}, 5)"],
        ),
        (lambda kv: {**kv, "value": kv["value"][:, :1]}, ValueError, ["do not fit"]),
        (lambda kv: {k: x[:1] for k, x in kv.items()}, ValueError, ["query="]),
    ],
)
def test_what_is_no_key_value(key_value, change, kind, parts):
    reader = SharedKeyValueAttention(4, name="reader")
    with raises(kind, "Layer 'reader'", *parts):
        reader(sample(), change(key_value))


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"num_heads": 4, "num_key_value_heads": 4}, ["num_key_value_heads=4"]),
        ({"num_heads": 1}, ["num_heads=1"]),
        ({"num_heads": 4, "key_dim": 8}, ["key_dim=8"]),
        ({"num_heads": 4, "value_dim": 3}, ["value_dim=3"]),
    ],
)
def test_heads_that_do_not_fit(key_value, settings, parts):
    reader = SharedKeyValueAttention(**settings, name="reader")
    with raises(ValueError, "Layer 'reader'", "Received: key_value={'key'", *parts):
        reader(sample(), key_value)


def test_arguments_are_checked_as_elsewhere(key_value):
    with raises(ValueError, "num_heads=4, num_key_value_heads=3"):
        SharedKeyValueAttention(4, 3)
    with raises(TypeError, "num_key_value_heads=2.0"):
        SharedKeyValueAttention(4, 2.0)
    with raises(ValueError, "num_heads=3", "key_dim=None"):
        SharedKeyValueAttention(3)(sample(), key_value)
    reader = SharedKeyValueAttention(4)
    with raises(ValueError, "without `cache_update_index`"):
        reader(sample(), key_value, cache=())
    with raises(ValueError, "was not made by layer"):
        reader(sample(), key_value, cache=(key_value,), cache_update_index=0)
    with raises(ValueError, "padding_mask"):
        reader(sample(), key_value, padding_mask=np.ones((BATCH, 3)))
