"""Cached layers under wrappers, maps and loops: right with a cache, or refused."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    CompositeCachedLayer,
    MultiHeadAttention,
    NewCacheScope,
    RotaryAttention,
    call_sites,
    call_with_cache,
    create_cache,
)
from attention.testing import check_cached_layer, check_cached_model
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    Shift,
    assert_close,
    raises,
    sample,
    to_numpy,
)


class Kernel(Shift):
    """`SpectralNormalization` wraps what has a kernel."""

    def build(self, inputs_shape):
        super().build(inputs_shape)
        self.kernel = self.add_weight(shape=(WIDTH, WIDTH), name="kernel")

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        x = ops.matmul(x, self.kernel)
        return super().call(x, padding_mask, cache, cache_update_index)


class Doubles(keras.layers.Wrapper):
    def call(self, x):
        return 2 * self.layer(x)


class Applies(keras.layers.Layer):
    """Calls a function of a cached layer and the inputs."""

    def __init__(self, function):
        super().__init__()
        self.function, self.inner = function, RotaryAttention(4, 2)

    def build(self, inputs_shape):
        self.inner.build((None, None, WIDTH))

    def call(self, x):
        return self.function(self.inner, x)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape


def model_of(layer):
    inputs = keras.Input((None, WIDTH))
    return keras.Model(inputs, layer(MultiHeadAttention(4)(inputs)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: keras.layers.SpectralNormalization(Kernel()),
        lambda: Doubles(RotaryAttention(4, 2)),
        lambda: Doubles(Doubles(Kernel())),
        lambda: Applies(lambda layer, x: layer(layer(x))),
    ],
)
@pytest.mark.slow
def test_wrappers_that_call_the_layer_have_caches(wrap):
    check_cached_model(lambda: model_of(wrap()), max_length=8, checks="chunks")


def over_time(x):
    """`(batch, length, width)` to one token after the other."""
    return ops.swapaxes(x, 0, 1)[:, :, None]


def joined(x):
    return ops.swapaxes(x[:, :, 0], 0, 1)


def time_distributed(layer, x):
    return keras.layers.TimeDistributed(layer)(x[:, :, None])[:, :, 0]


def vectorized_map(layer, x):
    return joined(ops.vectorized_map(layer, over_time(x)))


def mapped(layer, x):
    return joined(ops.map(layer, over_time(x)))


def scanned(layer, x):
    _, y = ops.scan(lambda carry, t: (carry, layer(t)), x[:, :1], over_time(x))
    return joined(y)


def over_copies(layer, x):
    """The rows are the model's."""
    return ops.sum(ops.vectorized_map(layer, ops.stack([x, 2 * x])), axis=0)


def unrolled(layer, x):
    steps = [layer(x[:, i : i + 1]) for i in range(x.shape[1])]
    return ops.concatenate(steps, axis=1)


def folded(layer, x):
    return ops.reshape(layer(ops.reshape(x, (-1, 1, WIDTH))), ops.shape(x))


def row_by_row(layer, x):
    return ops.concatenate([layer(x[i : i + 1]) for i in range(x.shape[0])])


REFUSED = {
    "time_distributed": (time_distributed, ["past its `__call__`", "TimeDistributed"]),
    "vectorized_map": (vectorized_map, ["traced on its own", "`vectorized_map`"]),
    "over_copies": (over_copies, ["traced on its own", "Call it outside"]),
    "map": (mapped, []),
    "scan": (scanned, []),
    "unrolled": (unrolled, ["2 times on 2 tokens and 1 times on one"]),
    "folded": (folded, ["is called on 6 rows, where the model has 3"]),
    "row_by_row": (row_by_row, ["is called on 1 rows, where the model has 3"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_have_a_cache_is_refused_at_once(name):
    function, parts = REFUSED[name]
    layer = Applies(function)
    model, x = model_of(layer), sample()
    # Without a cache it works.
    assert tuple(model(x).shape) == x.shape
    with raises(ValueError, f"'{layer.inner.name}'", *parts):
        create_cache(model, BATCH, LENGTH)


@pytest.mark.parametrize("name", ["time_distributed", "vectorized_map"])
def test_composite_layers_refuse_it_too(name):
    class Composite(CompositeCachedLayer):
        def build(self, inputs_shape):
            self.attend = RotaryAttention(4, 2)
            self.attend.build(inputs_shape)

        def transform(self, x):
            return REFUSED[name][0](self.attend, x)

    layer, x = Composite(), sample()
    assert tuple(layer(x).shape) == x.shape
    with raises(ValueError, "'rotary_attention"):
        layer.create_cache(BATCH, LENGTH)


def test_a_layer_applied_several_times_is_no_loop_over_the_sequence():
    def function(layer, x):
        for _ in range(3):
            x = layer(x)
        return x

    assert len(call_sites(model_of(Applies(function)))) == 4


def test_scopes_without_a_dry_run_refuse_it_too():
    model, x = model_of(Applies(time_distributed)), sample()
    model(x)
    with raises(ValueError, "past its `__call__`"), NewCacheScope(BATCH, LENGTH):
        model(x)
    model = model_of(Applies(unrolled))
    with NewCacheScope(BATCH, LENGTH) as scope:
        model(x[:, :2])
    with raises(ValueError, "cached call number 4", "loop", "call the layer once"):
        call_with_cache(model, x[:, 2:5], scope.cache, 2)
    with raises(ValueError, "3 slots", "2 cached layers", "in a loop"):
        call_with_cache(model, x[:, 2:3], scope.cache, 2)


def test_a_layer_under_time_distributed_in_a_functional_model():
    inputs = keras.Input((None, 4, WIDTH))
    layer = MultiHeadAttention(4)
    layer.build((None, None, WIDTH))
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    x = sample(2 * 3, 4).reshape((2, 3, 4, WIDTH))
    expected = np.stack([to_numpy(layer(x[:, i])) for i in range(3)], axis=1)
    assert_close(model(x), expected)
    assert layer.compute_output_shape((None, 4, WIDTH)) == (None, 4, WIDTH)


def test_a_subclass_may_call_its_parent():
    class Halved(MultiHeadAttention):
        def build(self, query_shape):
            super().build(query_shape)

        def call(self, query, padding_mask=None, cache=None, cache_update_index=None):
            if cache is None:
                return super().call(query, padding_mask=padding_mask) / 2
            given = {"cache": cache, "cache_update_index": cache_update_index}
            outputs, cache = super().call(query, padding_mask=padding_mask, **given)
            return outputs / 2, cache

    check_cached_layer(lambda: Halved(4), max_length=8, checks="chunks")
    layer, x = Halved(4), sample()
    model = keras.Sequential([keras.Input((None, WIDTH)), layer])
    with NewCacheScope(BATCH, LENGTH):
        assert_close(model(x), layer(x))
