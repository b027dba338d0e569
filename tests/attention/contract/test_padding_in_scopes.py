"""Padding masks that reach cached layers through a scope, and `last_tokens`."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    CachedLayer,
    CacheScope,
    CompositeCachedLayer,
    MultiHeadAttention,
    NewCacheScope,
    PositionEmbedding,
    RotaryAttention,
    T5Attention,
    call_with_cache,
    create_cache,
    last_tokens,
)
from attention.testing import check_cached_model
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    Shift,
    assert_close,
    compiled,
    ragged,
    raises,
    sample,
    secret,
    to_numpy,
)

MASK = ragged(7, 3, 5, length=7)


class Both(CompositeCachedLayer):
    def __init__(self):
        super().__init__()
        self.shift, self.attend = Shift(), RotaryAttention(4, 2)

    def transform(self, x):
        return x + self.attend(self.shift(x))


def functional():
    inputs = keras.Input((None, WIDTH))
    x = inputs + PositionEmbedding(LENGTH, "random_normal")(inputs)
    x = x + MultiHeadAttention(4)(Shift()(x))
    return keras.Model(inputs, Both()(x))


def sequential():
    layers = [Shift(), RotaryAttention(4, 2), T5Attention(4), Both()]
    return keras.Sequential([keras.Input((None, WIDTH)), *layers])


@pytest.mark.parametrize("make", [functional, sequential])
@pytest.mark.slow
def test_ragged_rows_give_what_each_gives_alone(make):
    check_cached_model(make, max_length=9, checks=["padding", "compiled"])


@pytest.mark.parametrize(
    "convert",
    [ops.convert_to_tensor, np.ndarray.tolist, lambda mask: mask.astype("int32")],
)
def test_kinds_of_masks(convert):
    model, x = sequential(), sample(length=7)
    cache = create_cache(model, BATCH, LENGTH)
    _, expected = call_with_cache(model, x, cache, 0, padding_mask=MASK)
    _, found = call_with_cache(model, x, cache, 0, padding_mask=convert(MASK))
    with NewCacheScope(BATCH, LENGTH, padding_mask=convert(MASK)) as scope:
        model(x)
    for cache in (found, scope.cache):
        keras.tree.map_structure(assert_close, cache, expected)


def test_a_mask_of_its_own_wins_and_inner_scopes_speak_for_themselves():
    seen = []

    class Spy(CachedLayer):
        def create_cache(self, batch_size, max_length):
            return ops.zeros((batch_size, 1))

        def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
            mask = padding_mask
            seen.append(None if mask is None else to_numpy(mask).sum())
            return x if cache is None else (x, cache)

    class Inner(Spy):
        """Calls another cached layer by hand, and forgets the mask."""

        def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
            if cache is None:
                return spy(x)
            return spy(x, cache=cache, cache_update_index=cache_update_index)

    x, spy, inner = sample(length=7), Spy(), Inner()
    other = np.ones((BATCH, 7), bool)
    spy(x), inner(x)
    with NewCacheScope(BATCH, LENGTH, MASK) as scope:
        for layer in (spy, inner):
            layer(x)
            layer(x, padding_mask=other)
        # The tokens of a scope within are others.
        with NewCacheScope(BATCH, LENGTH):
            spy(x)
        spy(x)
    assert len(scope.cache) == 5
    spy(x)
    given = [MASK.sum(), other.sum()]
    assert seen == [None, None, *given, *given, None, MASK.sum(), None]


@pytest.mark.parametrize(
    "mask, parts",
    [
        (secret(BATCH), ["float32 tensor of shape (3,)"]),
        (secret(BATCH, 7, 1), ["(3, 7, 1)"]),
        (secret(2, 7), ["(2, 7)", "for 3 rows"]),
        ("mask", ["padding_mask='mask'"]),
        (MASK[:, ::-1], ["1, ..., 1, 0, ..., 0", "on the right"]),
    ],
)
def test_masks_that_are_none(mask, parts):
    model, x = sequential(), secret(BATCH, 7, WIDTH)
    cache = create_cache(model, BATCH, LENGTH)
    with raises(ValueError, "`padding_mask`", *parts):
        call_with_cache(model, x, cache, 0, mask)
    with raises(ValueError, "`padding_mask`", *parts):
        NewCacheScope(BATCH, LENGTH, mask)


def test_a_mask_of_other_tokens():
    model, x = sequential(), secret(BATCH, 4, WIDTH)
    cache = create_cache(model, BATCH, LENGTH)
    with raises(ValueError, "does not fit", "'shift", "(3, 7)", "(3, 4, 16)"):
        call_with_cache(model, x, cache, 0, MASK)
    with raises(ValueError, "does not fit"), CacheScope(cache, 0, MASK):
        model(x)


# === last_tokens ===


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 10), "int32"),
        ((3, 10), "bool"),
        ((3, 10, 4), "float32"),
        ((3, 10, 2, 3), "bfloat16"),
    ],
)
def test_last_tokens(shape, dtype):
    history = ops.cast(np.random.default_rng(0).integers(-9, 9, shape), dtype)
    values = to_numpy(ops.cast(history, "float32"))
    mask = np.arange(6)[None] < np.array([0, 2, 6])[:, None]
    for count in (1, 3, 4):
        ends = 4 + mask.sum(axis=1)
        expected = np.stack([v[e - count : e] for v, e in zip(values, ends)])

        @compiled
        def run(history, mask, count=count):
            return last_tokens(history, mask, count)

        for result in (
            last_tokens(history, mask.astype("int32"), count),
            run(history, ops.convert_to_tensor(mask)),
        ):
            assert keras.backend.standardize_dtype(result.dtype) == dtype
            assert_close(ops.cast(result, "float32"), expected, atol=0)
        result = ops.cast(last_tokens(history, count=count), "float32")
        assert_close(result, values[:, -count:], atol=0)


def test_last_tokens_of_unknown_sizes():
    class Last(keras.layers.Layer):
        def call(self, history, mask):
            return last_tokens(history, mask, 2)

    history, mask = keras.Input((None, 4)), keras.Input((None,), dtype="bool")
    model = keras.Model([history, mask], Last()(history, mask))
    assert tuple(model.output.shape)[1:] == (2, 4)
    x = sample(width=4)
    result = model([x, np.ones((BATCH, 3), bool)])
    assert_close(result, x[:, -2:], atol=0)


@pytest.mark.parametrize(
    "history, mask, count, kind, parts",
    [
        (secret(3), None, 1, ValueError, ["`history`", "(3,)"]),
        (secret(3, 1, 4), None, 2, ValueError, ["count=2", "(3, 1, 4)"]),
        (secret(3, 5, 4), np.ones((3, 4)), 2, ValueError, ["`padding_mask`", "(3, 4)"]),
        (secret(3, 5, 4), np.ones((2, 4)), 1, ValueError, ["`padding_mask`", "(2, 4)"]),
        (secret(3, 5, 4), np.ones((3,)), 1, ValueError, ["`padding_mask`", "(3,)"]),
        (secret(3, 5, 4), None, 0, ValueError, ["`count`", "count=0"]),
        (secret(3, 5, 4), None, 1.0, TypeError, ["`count`", "count=1.0"]),
    ],
)
def test_last_tokens_refuses(history, mask, count, kind, parts):
    with raises(kind, *parts):
        last_tokens(history, mask, count)
