"""Whole Keras models with a cache: call sites, scopes, masks of composite layers.

That outputs with a cache equal those without is for the conformance suite.
"""

import collections

import keras
import numpy as np
from keras import ops, tree

from attention import (
    CompositeCachedLayer,
    MultiHeadAttention,
    NewCacheScope,
    PositionEmbedding,
    RotaryAttention,
    T5Attention,
    call_sites,
    call_with_cache,
    create_cache,
    grow_cache,
)
from attention.contract import all_layers, max_positions
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    EmbedAndAttendTwice,
    as_index,
    assert_close,
    make,
    ragged,
    randomize,
    run_chunks,
    sample,
    to_numpy,
)


def functional():
    """Learned positions, a layer called twice, and a nested Sequential."""
    inputs = keras.Input((None, WIDTH))
    x = inputs + PositionEmbedding(LENGTH)(inputs)
    attend = MultiHeadAttention(4)
    x = x + attend(x)
    x = x + attend(keras.layers.LayerNormalization()(x))
    nested = keras.Sequential([RotaryAttention(4, 2), T5Attention(4)])
    return randomize(keras.Model(inputs, keras.layers.Dense(5)(nested(x))), scale=0.2)


def test_call_sites_are_found_in_order():
    names = [type(layer).__name__ for layer in call_sites(functional())]
    assert names == [
        "PositionEmbedding",
        "MultiHeadAttention",
        "MultiHeadAttention",
        "RotaryAttention",
        "T5Attention",
    ]
    assert max_positions(call_sites(functional())) == LENGTH
    # A composite is one call site, whatever is in it.
    inputs = keras.Input((None, WIDTH))
    model = keras.Model(inputs, EmbedAndAttendTwice()(RotaryAttention(4)(inputs)))
    assert len(call_sites(model)) == 2
    for shape in ((BATCH, None, WIDTH), (None, LENGTH, WIDTH), (BATCH, 4, WIDTH)):
        inputs = keras.Input(batch_shape=shape)
        model = keras.Model(inputs, MultiHeadAttention(4)(inputs))
        assert len(call_sites(model)) == 1


def test_a_new_scope_makes_its_cache_at_first_use():
    model, x = functional(), sample()
    with NewCacheScope(BATCH, 4) as scope:
        head = model(x[:, :4])
    assert scope.layers == list(call_sites(model))
    cache = grow_cache(scope.layers, scope.cache, LENGTH)
    expected = create_cache(model, BATCH, LENGTH)
    shapes = [[tuple(x.shape) for x in tree.flatten(c)] for c in (cache, expected)]
    assert shapes[0] == shapes[1]
    tail, _ = call_with_cache(model, x[:, 4:8], cache, 4)
    outputs = np.concatenate([to_numpy(head), to_numpy(tail)], axis=1)
    assert_close(outputs, model(x)[:, :8], atol=1e-4)


def test_a_scope_can_be_opened_inside_another():
    model, x = functional(), sample()
    cache = create_cache(model, BATCH, LENGTH)
    with NewCacheScope(BATCH, LENGTH) as outer:
        inner, _ = call_with_cache(model, x[:, :4], cache, 0)
        plain = model(x[:, :4])
    assert_close(inner, plain)
    assert len(outer.cache) == len(cache)


def test_a_model_that_takes_a_cache_as_its_inputs():
    layer = make("rotary")
    token = keras.Input((1, WIDTH))
    cache = tree.map_structure(
        lambda t: keras.Input(tuple(t.shape[1:]), dtype="float32"),
        layer.create_cache(1, LENGTH),
    )
    index = keras.Input((), dtype="int32")
    outputs = layer(token, cache=cache, cache_update_index=index)
    model = keras.Model([token, cache, index], outputs)
    x = sample()
    _, cache = run_chunks(layer, x[:, :4], [4])
    token = ops.convert_to_tensor(x[:, 4:5])
    result, _ = model([token, cache, as_index("rows", 4)])
    assert_close(result, layer(x)[:, 4:5])


class Pools(CompositeCachedLayer):
    """Inner layers on other rows and lengths have no use for the mask."""

    def build(self, inputs_shape):
        self.attend = MultiHeadAttention(2)
        self.attend.build(inputs_shape)
        self.over_rows = MultiHeadAttention(2)
        self.over_rows.build((None, None, inputs_shape[-1] // 2))

    def transform(self, x, padding_mask=None, training=None):
        x = x + self.attend(x)
        batch, width = x.shape[0], x.shape[2]
        halves = ops.reshape(ops.transpose(x, (0, 2, 1)), (2 * batch, width // 2, -1))
        halves = ops.transpose(halves, (0, 2, 1))
        halves = self.over_rows(halves, padding_mask=ops.tile(padding_mask, (2, 1)))
        return x + ops.concatenate([halves, halves], axis=-1)[:batch]


def test_inner_layers_inherit_the_mask_of_their_own_tokens_only():
    layer, x = Pools(), sample()
    layer.build(x.shape)
    assert tuple(layer(x, padding_mask=ragged(11, 5, 1)).shape) == x.shape


Pair = collections.namedtuple("Pair", ["first", "second"])


def test_layers_are_found_however_they_are_kept():
    class Holder(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.one = keras.layers.Dense(1)
            self.several = [keras.layers.Dense(1), (keras.layers.Dense(1),)]
            self.pair = Pair(keras.layers.Dense(1), keras.Sequential([self.one]))
            self.named = {"x": keras.layers.Dense(1)}

    with keras.RematScope(mode="activations"):
        holder = Holder()
    found = all_layers(holder)
    assert found[0] is holder
    assert sum(isinstance(x, keras.layers.Dense) for x in found) == 5
    assert len({id(x) for x in found}) == len(found)


class ThroughTheCache(keras.Model):
    """Makes its inner model's cache in its call, so within a training step."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        cache = create_cache(self.inner, BATCH, LENGTH)
        head, cache = call_with_cache(self.inner, x[:, :3], cache, 0)
        tail, _ = call_with_cache(self.inner, x[:, 3:], cache, 3)
        return ops.concatenate([head, tail], axis=1)


def test_caches_are_created_within_evaluate_and_fit():
    """On JAX, variables have values there only in the scope of the training step."""
    x = sample()
    y = to_numpy(x)[..., :5]
    inner = functional()
    expected = np.mean((to_numpy(inner(x)) - y) ** 2)
    model = ThroughTheCache(inner)
    model.compile(optimizer="sgd", loss="mse")
    assert_close(model.evaluate(x, y, batch_size=BATCH, verbose=0), expected)
    # The call sites of an inner layer are not known yet, either.
    model = ThroughTheCache(functional())
    model.compile(optimizer="sgd", loss="mse")
    model.fit(x, y, batch_size=BATCH, verbose=0)
