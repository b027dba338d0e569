"""Composite layers whose `transform` takes and returns more than one tensor."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    CachedLayer,
    CompositeCachedLayer,
    MultiHeadAttention,
    create_cache,
)
from attention.testing import check_cached_model
from tests.helpers import (
    LENGTH,
    WIDTH,
    assert_close,
    built,
    gradients,
    raises,
    sample,
    to_numpy,
)


@keras.saving.register_keras_serializable(package="tests")
class Mixer(CompositeCachedLayer):
    """Takes a second sequence and an option; returns two tensors."""

    def build(self, inputs_shape):
        self.attend = MultiHeadAttention(2)
        self.attend.build(inputs_shape)
        self.look_back = MultiHeadAttention(4)
        self.look_back.build(inputs_shape)

    def transform(self, x, other, gain=1.0, padding_mask=None, training=None):
        mixed = x + self.attend(x + gain * other["first"])
        return mixed, {"first": self.look_back(other["first"])}


class Optional(CompositeCachedLayer):
    """Without `other` one call of a cached layer, with it two."""

    def build(self, inputs_shape):
        self.attend = MultiHeadAttention(2)
        self.attend.build(inputs_shape)

    def transform(self, x, other=None):
        x = self.attend(x)
        return x if other is None else x + self.attend(other)


def make(cls=Mixer):
    return built(cls(name="mixer"))


def others(x):
    return {"first": sample(batch=x.shape[0], length=x.shape[1], seed=5)}


def decode(layer, x, other, **kwargs):
    """Seven tokens, then the others, with a cache."""
    cache, outputs = layer.create_cache(x.shape[0], LENGTH), []
    for start, end in ((0, 7), (7, LENGTH)):
        now = {"first": other["first"][:, start:end]}
        index = {"cache": cache, "cache_update_index": start}
        (y, more), cache = layer(x[:, start:end], now, **index, **kwargs)
        outputs.append((to_numpy(y), to_numpy(more["first"])))
    return [np.concatenate(parts, axis=1) for parts in zip(*outputs)]


@pytest.mark.slow
def test_arguments_by_position_or_keyword():
    layer, x = make(), sample()
    other, mask = others(x), np.ones(x.shape[:2], bool)
    y, more = layer(x, other)
    doubled = {"first": 2 * other["first"]}
    for outputs in (
        layer(x, other=other),
        layer(x=x, other=other, gain=1.0),
        layer(x, other, padding_mask=mask, training=False),
        layer(x, doubled, gain=0.5),
        decode(layer, x, other),
        decode(layer, x, doubled, gain=0.5),
    ):
        assert_close(outputs[0], y)
    assert_close(decode(layer, x, other)[1], more["first"])


def test_the_signature_of_call_is_that_of_transform():
    parameters = inspect.signature(make().call).parameters
    names = "x other gain padding_mask cache cache_update_index training segment_ids"
    # What Keras hands over by itself comes last.
    assert [*parameters] == [*names.split(), "mask", "x_mask"]
    assert parameters["gain"].default == 1.0


def test_gradients_of_a_first_call():
    """Whatever traces it, the first call without a cache is only a call."""

    class OneOutput(Mixer):
        def transform(self, x, other):
            y, more = super().transform(x, {"first": other})
            return y + more["first"]

    layer, x = make(OneOutput), ops.convert_to_tensor(sample())
    found = gradients(layer, x, other=ops.convert_to_tensor(sample(seed=5)))
    assert len(found) == len(layer.trainable_weights)
    assert len(layer.create_cache(1, 4)) == 2


def make_model():
    x, first = keras.Input((None, WIDTH)), keras.Input((None, WIDTH))
    mixer = Mixer(name="first_mixer")
    y, more = mixer(x, {"first": first}, gain=0.5)
    y, more = Mixer()(y, more)
    return keras.Model([x, first], y + more["first"])


@pytest.mark.slow
def test_a_functional_model_keeps_the_contract():
    checks = ["chunks", "padding", "compiled", "gradients"]
    check_cached_model(make_model, max_length=9, checks=checks)


@pytest.mark.slow
def test_a_functional_model_is_trained_and_saved(tmp_path):
    model, inputs = make_model(), [sample(), sample(seed=5)]
    model.compile(optimizer="adam", loss="mse")
    model.fit(inputs, sample(seed=6), epochs=1, verbose=0)
    assert [len(slot) for slot in create_cache(model, 1, 4)] == [2, 2]
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert len(restored.get_layer("first_mixer").create_cache(1, 4)) == 2


# === When the call sites are known ===


def test_a_cache_before_the_first_call_is_refused():
    layer, x = make(), sample()
    with raises(ValueError, "Mixer.transform` needs ['other']", "without a cache"):
        layer.create_cache(1, 4)
    layer(x, others(x))
    assert len(layer.create_cache(1, 4)) == 2


def test_layers_that_are_built_in_the_first_call_are_counted_once():
    class Lazy(CompositeCachedLayer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = keras.Sequential([MultiHeadAttention(2)])
            self.attend = MultiHeadAttention(2)

        def transform(self, x, other):
            return self.inner(x) + self.attend(other)

    layer, x = Lazy(), sample()
    full = layer(x, sample(seed=5))
    cache = layer.create_cache(3, LENGTH)
    assert len(cache) == 2
    outputs, _ = layer(x, sample(seed=5), cache=cache, cache_update_index=0)
    assert_close(outputs, full)


def test_a_call_without_training_tells_better():
    class Auxiliary(Mixer):
        def transform(self, x, other, training=None):
            y = self.attend(x + other)
            return y + self.look_back(x) if training else y

    layer, x = make(Auxiliary), sample()
    layer(x, x, training=True)
    layer(x, x)
    assert len(layer.create_cache(1, 4)) == 1
    layer(x, x, training=True)
    assert len(layer.create_cache(1, 4)) == 1


def test_an_optional_argument():
    layer, x = make(Optional), sample()
    assert len(layer.create_cache(1, 4)) == 1
    layer(x, x)
    assert len(layer.create_cache(1, 4)) == 2
    other = make(Optional)
    full = other(x)
    outputs, _ = other(x, cache=other.create_cache(3, LENGTH), cache_update_index=0)
    assert_close(outputs, full)


# === Errors, and classes with a `call` of their own ===


@pytest.mark.parametrize(
    "call, part",
    [
        (lambda layer, x: layer(x, x, key_value=x), "with the arguments ['key_value']"),
        (lambda layer, x: layer(x), "without ['other']"),
        (lambda layer, x: layer(other=x), "without ['x']"),
        (lambda layer, x: layer(*[x] * 9), "too many arguments"),
    ],
)
def test_wrong_arguments(call, part):
    layer = make()
    with raises(TypeError, "Layer 'mixer'", "Mixer.transform", "'gain'", part):
        call(layer, sample())


def test_a_call_of_ones_own_stays():
    class Doubling(CompositeCachedLayer):
        def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
            return super().call(2 * x, padding_mask, cache, cache_update_index)

    class Identity(Doubling):
        def transform(self, x):
            return x

    assert_close(Identity()(sample()), 2 * sample())
    assert issubclass(Doubling, CachedLayer)
