"""`return_key_value` and `SharedKeyValueAttention`: one producer, several readers."""

import functools

import keras
import numpy as np
import pytest

from attention import (
    AlibiBias,
    CompositeCachedLayer,
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
    WIDTH,
    assert_close,
    randomize,
    sample,
    to_numpy,
)

SETTINGS = {
    "plain": {"num_heads": 4, "num_key_value_heads": 4},
    "grouped": {"num_heads": 4, "num_key_value_heads": 2},
    "one": {"num_heads": 4, "num_key_value_heads": 1, "use_bias": False},
    "rotary": {"num_heads": 4, "num_key_value_heads": 2, "position": RotaryPosition},
    "alibi": {"num_heads": 4, "num_key_value_heads": 2, "position": AlibiBias},
    "t5": {"num_heads": 4, "num_key_value_heads": 4, "position": RelativePositionBias},
    "value_dim": {
        "num_heads": 4,
        "num_key_value_heads": 2,
        "value_dim": 6,
        "key_dim": 8,
    },
    "scale": {"num_heads": 4, "num_key_value_heads": 4, "scale": 0.3},
}


def make_pair(name):
    """A producer, and a reader with its query and output weights."""
    position = SETTINGS[name].get("position")
    pair = []
    for cls in (GroupedQueryAttention, SharedKeyValueAttention):
        settings = dict(SETTINGS[name])
        if position is not None:
            settings["position"] = position()
        layer = cls(**settings)
        layer.build((None, None, WIDTH))
        pair.append(randomize(layer))
    producer, reader = pair
    for part in ("query_dense", "output_dense"):
        getattr(reader, part).set_weights(getattr(producer, part).get_weights())
    if name == "t5":
        reader.position.set_weights(producer.position.get_weights())
    return producer, reader


every_setting = pytest.mark.parametrize("name", SETTINGS)


# === As the producer itself ===


@every_setting
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


class ProducerAndReader(CompositeCachedLayer):
    """Keys and values of one attention layer that another one reads, too."""

    def __init__(self, name, **kwargs):
        super().__init__()
        self.setting, self.options = name, kwargs

    def build(self, inputs_shape):
        options = {**SETTINGS[self.setting], **self.options}
        position = options.pop("position", lambda: None)
        self.producer, self.reader = (
            cls(**options, position=position(), dtype=self.dtype_policy)
            for cls in (GroupedQueryAttention, SharedKeyValueAttention)
        )
        for layer in (self.producer, self.reader):
            layer.build(inputs_shape)

    def transform(self, x, padding_mask=None):
        y, key_value = self.producer(x, return_key_value=True)
        return y + self.reader(x, key_value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("t5", {}),
        ("rotary", {"window": 4}),
        *(
            pytest.param(name, {}, marks=pytest.mark.slow)
            for name in SETTINGS
            if name != "t5"
        ),
    ],
)
def test_a_reader_with_a_cache_equals_one_without(name, options):
    checks = ["chunks", "positions", "padding", "capacity"]
    make = functools.partial(ProducerAndReader, name, **options)
    check_cached_layer(make, max_length=9, checks=checks)


def test_hidden_positions_are_those_of_padding():
    producer, _ = make_pair("plain")
    mask = np.arange(LENGTH)[None] < np.array([[5], [12], [1]])
    _, key_value = producer(sample(), padding_mask=mask, return_key_value=True)
    positions = to_numpy(key_value["positions"])
    assert (positions[~mask] == HIDDEN_POSITION).all()
    np.testing.assert_array_equal(positions[1], np.arange(LENGTH))


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
    outputs, scores, key_value = producer(x, **both)
    assert tuple(scores.shape) == (BATCH, 4, LENGTH, LENGTH)
    assert tuple(key_value["key"].shape) == (BATCH, 2, LENGTH, 4)
    (cached, *_), _ = producer(x, cache=cache, cache_update_index=0, **both)
    assert_close(cached, outputs)


def test_keys_of_another_source():
    producer, reader = make_pair("rotary")
    x, source = sample(), sample(length=5, seed=1)
    outputs, key_value = producer(x, source, return_key_value=True)
    assert tuple(key_value["key"].shape) == (BATCH, 2, 5, 4)
    assert_close(reader(x, key_value), outputs)


# === A NumPy reference ===


def reference(reader, x, key_value, bias=0.0):
    """Grouped attention to given keys and values, by positions."""
    weights = {w.path.split("/", 1)[1]: to_numpy(w) for w in reader.weights}
    q = np.einsum("blw,whd->bhld", x, weights["query/kernel"])
    q = q + weights["query/bias"][:, None]
    k, v = (np.repeat(key_value[name], 2, axis=1) for name in ("key", "value"))
    logits = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
    positions = key_value["positions"][:, None, None]
    seen = positions <= np.arange(x.shape[1])[:, None]
    logits = np.where(seen, logits, -np.inf)
    logits = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores = logits / logits.sum(axis=-1, keepdims=True)
    attended = np.einsum("bhqk,bhkd->bqhd", scores, v)
    outputs = np.einsum("bqhd,hdw->bqw", attended, weights["attention_output/kernel"])
    return outputs + weights["attention_output/bias"]


def scattered_key_value(seed=3):
    """Keys in slots of no order, as in a ring, two of which are padding."""
    rng = np.random.default_rng(seed)
    positions = np.stack([rng.permutation(9) for _ in range(BATCH)]).astype("int32")
    positions[:, 0], positions[:, 1] = 0, HIDDEN_POSITION
    return {
        "key": rng.normal(size=(BATCH, 2, 9, 4)).astype("float32"),
        "value": rng.normal(size=(BATCH, 2, 9, 4)).astype("float32"),
        "positions": positions,
    }


@pytest.mark.parametrize("num_key_value_heads", [None, 2])
def test_against_numpy(num_key_value_heads):
    reader = SharedKeyValueAttention(4, num_key_value_heads)
    reader.build((None, None, WIDTH))
    randomize(reader)
    x, key_value = sample(), scattered_key_value()
    assert_close(reader(x, key_value), reference(reader, x, key_value))


def test_alibi_against_numpy():
    reader = SharedKeyValueAttention(4, position=AlibiBias())
    reader.build((None, None, WIDTH))
    randomize(reader)
    x, key_value = sample(), scattered_key_value()
    distance = np.arange(LENGTH)[:, None] - key_value["positions"][:, None, None]
    slopes = 2.0 ** (-2 * np.arange(1, 5))[:, None, None]
    expected = reference(reader, x, key_value, bias=-slopes * np.abs(distance))
    assert_close(reader(x, key_value), expected)


def test_attention_mask_counts_positions():
    producer, reader = make_pair("grouped")
    x = sample()
    mask = np.random.default_rng(0).random((BATCH, LENGTH, LENGTH)) < 0.6
    outputs, key_value = producer(x, attention_mask=mask, return_key_value=True)
    assert_close(reader(x, key_value, attention_mask=mask), outputs)
    shared = mask[:1]
    expected = producer(x, attention_mask=shared)
    assert_close(reader(x, key_value, attention_mask=shared), expected)
    cache = producer.create_cache(BATCH, 20)
    settings = {"cache_update_index": 0}
    (_, key_value), _ = producer(x, cache=cache, return_key_value=True, **settings)
    cached, _ = reader(x, key_value, attention_mask=mask, cache=(), **settings)
    assert_close(cached, outputs)
