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
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    assert_close,
    compiled,
    raises,
    randomize,
    sample,
    secret,
    to_numpy,
)

LENGTHS = np.array([7, 3, 5])
MASK = np.arange(7)[None] < LENGTHS[:, None]


class LagAndAdd(CachedLayer):
    def build(self, inputs_shape):
        self.width = inputs_shape[-1]

    def create_cache(self, batch_size, max_length):
        return ops.zeros((batch_size, 2, self.width), self.compute_dtype)

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        shape = (ops.shape(x)[0], 2, self.width)
        past = ops.zeros(shape, x.dtype) if cache is None else cache
        seen = ops.concatenate([past, x], axis=1)
        outputs = x + seen[:, 1:-1] - seen[:, :-2]
        if cache is None:
            return outputs
        return outputs, last_tokens(seen, padding_mask, count=2)


class Both(CompositeCachedLayer):
    def build(self, inputs_shape):
        self.lag = LagAndAdd()
        self.attend = RotaryAttention(4, 2)
        for layer in (self.lag, self.attend):
            layer.build(inputs_shape)

    def transform(self, x):
        return x + self.attend(self.lag(x))


def functional():
    inputs = keras.Input((None, WIDTH))
    x = inputs + PositionEmbedding(LENGTH)(inputs)
    x = x + MultiHeadAttention(4)(LagAndAdd()(x))
    return randomize(keras.Model(inputs, Both()(x)), scale=0.2)


def sequential():
    layers = [LagAndAdd(), RotaryAttention(4, 2), T5Attention(4), Both()]
    return randomize(keras.Sequential([keras.Input((None, WIDTH)), *layers]), scale=0.2)


models = pytest.mark.parametrize("make", [functional, sequential])


@models
@pytest.mark.parametrize("kind", ["numpy", "tensor", "list", "int"])
def test_ragged_rows_give_what_each_gives_alone(make, kind):
    model, x = make(), sample()
    convert = {
        "numpy": np.asarray,
        "tensor": ops.convert_to_tensor,
        "list": np.ndarray.tolist,
        "int": lambda m: m.astype("int32"),
    }[kind]
    padded = np.where(MASK[..., None], x[:, :7], 99.0).astype("float32")
    cache = create_cache(model, BATCH, LENGTH)
    head, cache = call_with_cache(model, padded, cache, 0, padding_mask=convert(MASK))
    # Each row goes on at its own position; one of them has nothing more to say.
    new = np.stack([x[i, n : n + 2] for i, n in enumerate(LENGTHS)])
    more = np.array([[1, 1], [0, 0], [1, 0]])
    tail, cache = call_with_cache(
        model, new, cache, LENGTHS.astype("int32"), convert(more.astype(bool))
    )
    index = (LENGTHS + more.sum(axis=1)).astype("int32")
    last, _ = call_with_cache(
        model, np.stack([x[i, n : n + 1] for i, n in enumerate(index)]), cache, index
    )
    for row, length in enumerate(LENGTHS):
        alone = to_numpy(model(x[row : row + 1]))[0]
        assert_close(head[row, :length], alone[:length], atol=1e-4)
        count = more[row].sum()
        assert_close(tail[row, :count], alone[length : length + count], atol=1e-4)
        assert_close(last[row, 0], alone[index[row]], atol=1e-4)


def test_new_scopes_and_compiled_ones():
    model, x = functional(), sample()

    @compiled
    def prefill(x, mask):
        with NewCacheScope(BATCH, LENGTH, padding_mask=mask) as scope:
            outputs = model(x)
        return outputs, scope.cache

    @compiled
    def step(x, mask, cache, index):
        return call_with_cache(model, x, cache, index, mask)

    head, cache = prefill(*map(ops.convert_to_tensor, (x[:, :7], MASK)))
    new = np.stack([x[i, n : n + 1] for i, n in enumerate(LENGTHS)])
    one = np.ones((BATCH, 1), bool)
    index = ops.convert_to_tensor(LENGTHS.astype("int32"))
    outputs, _ = step(*map(ops.convert_to_tensor, (new, one)), cache, index)
    full = to_numpy(model(x))
    for row, length in enumerate(LENGTHS):
        assert_close(head[row, :length], full[row, :length], atol=1e-4)
        assert_close(outputs[row, 0], full[row, length], atol=1e-4)


def test_a_mask_of_its_own_wins_and_inner_scopes_speak_for_themselves():
    seen = {}

    class Spy(CachedLayer):
        def create_cache(self, batch_size, max_length):
            return ops.zeros((batch_size, 1))

        def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
            mask = padding_mask
            seen[self.name] = None if mask is None else to_numpy(mask).sum()
            return x if cache is None else (x, cache)

    class Inner(CachedLayer):
        """Calls another cached layer by hand, and forgets the mask."""

        def build(self, inputs_shape):
            self.spy = Spy(name="inner")
            self.spy.build(inputs_shape)

        def create_cache(self, batch_size, max_length):
            return self.spy.create_cache(batch_size, max_length)

        def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
            if cache is None:
                return self.spy(x)
            return self.spy(x, cache=cache, cache_update_index=cache_update_index)

    x, spy, inner = sample(length=7), Spy(name="spy"), Inner()
    other = np.ones((BATCH, 7), bool)
    spy(x), inner(x)
    with NewCacheScope(BATCH, LENGTH, MASK) as scope:
        spy(x)
        assert seen.pop("spy") == MASK.sum()
        spy(x, padding_mask=other)
        assert seen.pop("spy") == other.sum()
        inner(x)
        assert seen.pop("inner") == MASK.sum()
        inner(x, padding_mask=other)
        assert seen.pop("inner") == other.sum()
        # The tokens of a scope within are others.
        with NewCacheScope(BATCH, LENGTH):
            spy(x)
        assert seen.pop("spy") is None
        spy(x)
        assert seen.pop("spy") == MASK.sum()
    assert len(scope.cache) == 5
    spy(x)
    assert seen.pop("spy") is None


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
    with raises(ValueError, "does not fit", "'lag_and_add", "(3, 7)", "(3, 4, 16)"):
        call_with_cache(model, x, cache, 0, MASK)
    with raises(ValueError, "does not fit"), CacheScope(cache, 0, MASK):
        model(x)


# === last_tokens ===


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
@pytest.mark.parametrize("shape", [(3, 10), (3, 10, 4), (3, 10, 2, 3)])
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
