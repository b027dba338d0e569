"""The recurrence that all recurrent mixers share, against a loop in NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import LinearRecurrence
from attention.recurrent.chunked_scan import CHUNK, CHUNK_OF_VECTORS, linear_recurrence
from attention.testing import backends
from tests.helpers import assert_close, compiled, slow, to_numpy

HEADS, KEY, VALUE = 2, 4, 3


def sample(length, vectors, delta, rows=2, seed=0):
    rng = np.random.default_rng(seed)
    shape = (rows, length, HEADS)

    def normal(dim):
        return rng.normal(size=(*shape, dim)).astype("float32")

    inputs = {"query": normal(KEY), "key": normal(KEY), "value": normal(VALUE)}
    # From almost no decay to the strongest that each kind is made for.
    if vectors:
        inputs["log_decay"] = -0.6 * rng.random((*shape, KEY)).astype("float32")
    else:
        inputs["log_decay"] = -np.exp(rng.normal(-2, 3, (*shape, 1))).astype("float32")
    inputs["state"] = rng.normal(size=(rows, HEADS, KEY, VALUE)).astype("float32")
    if delta:
        unit = normal(KEY)
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        inputs["remove"] = -unit
        inputs["replace"] = unit * rng.random((*shape, KEY)).astype("float32")
    return inputs


def loop(query, key, value, log_decay, state, remove=None, replace=None):
    """Computes one token after the other, as in the papers."""
    outputs = np.zeros((*query.shape[:3], value.shape[-1]))
    states = state.astype("float64").copy()
    for row, head in np.ndindex(query.shape[0], query.shape[2]):
        matrix = states[row, head]
        for t in range(query.shape[1]):
            at = (row, t, head)
            new = np.exp(log_decay[at].astype("float64"))[:, None] * matrix
            if remove is not None:
                new = new + np.outer(replace[at], remove[at] @ matrix)
            matrix = new + np.outer(key[at], value[at])
            outputs[at] = query[at] @ matrix
        states[row, head] = matrix
    return outputs, states


every_kind = pytest.mark.parametrize("vectors", [False, True], ids=["head", "vector"])
every_rule = pytest.mark.parametrize("delta", [False, True], ids=["add", "delta"])


@every_kind
@every_rule
@pytest.mark.parametrize(
    "length", [1, 15, 3 * CHUNK + 5, *map(slow, (2, CHUNK, CHUNK + 1))]
)
def test_chunks_equal_a_loop(length, vectors, delta):
    inputs = sample(length, vectors, delta)
    expected, last = loop(**inputs)
    outputs, state = compiled(lambda inputs: linear_recurrence(**inputs))(
        {name: ops.convert_to_tensor(x) for name, x in inputs.items()}
    )
    scale = np.abs(expected).max()
    assert_close(to_numpy(outputs) / scale, expected / scale)
    scale = np.abs(last).max()
    assert_close(to_numpy(state) / scale, last / scale)


def test_tokens_that_repeat():
    """What each writes the next removes: sums of powers would cancel."""
    inputs = sample(CHUNK, False, True)
    inputs["remove"] = np.broadcast_to(inputs["remove"][:, :1], inputs["remove"].shape)
    inputs["replace"] = -inputs["remove"]
    inputs["log_decay"] = np.zeros_like(inputs["log_decay"])
    expected, _ = loop(**inputs)
    outputs, _ = linear_recurrence(
        **{name: ops.convert_to_tensor(x) for name, x in inputs.items()}
    )
    assert_close(outputs, expected, atol=1e-4)


def compiled_gradients(function, tensors):
    """Those of a scalar function, compiled as `fit` compiles them."""
    if keras.config.backend() != "tensorflow":
        return backends.gradients(function, [], tensors)
    import tensorflow as tf

    def call(tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = function(tensors)
        return tape.gradient(loss, tensors)

    return compiled(call)([ops.convert_to_tensor(x) for x in tensors])


@every_rule
@pytest.mark.parametrize("chunks", [2, 5, *map(slow, (3, 4, 6))])
def test_gradients_are_the_slopes_of_the_loop(chunks, delta):
    inputs = sample(CHUNK_OF_VECTORS * chunks, True, delta, rows=1)
    names, tensors = zip(*inputs.items())
    rng = np.random.default_rng(1)
    direction = rng.normal(size=(1, CHUNK_OF_VECTORS * chunks, HEADS, VALUE))

    def loss(tensors):
        outputs, _ = linear_recurrence(**dict(zip(names, tensors)))
        return ops.sum(outputs * ops.convert_to_tensor(direction, dtype="float32"))

    found = compiled_gradients(loss, list(tensors))
    for name, x, gradient in zip(names, tensors, found):
        step = rng.normal(size=x.shape)
        ends = [
            np.sum(loop(**{**inputs, name: x + size * step})[0] * direction)
            for size in (1e-5, -1e-5)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        size = np.abs(to_numpy(gradient) * step).sum()
        assert abs(np.sum(to_numpy(gradient) * step) - slope) < 1e-4 * size, name


@every_kind
@every_rule
def test_padding_changes_nothing(vectors, delta):
    inputs = sample(9, vectors, delta)
    state = inputs.pop("state")
    layer = LinearRecurrence(HEADS, KEY, VALUE)
    real = np.array([9, 4])
    mask = np.arange(9)[None] < real[:, None]
    # Not even by NaN.
    spoiled = {
        name: np.where(mask[:, :, None, None], x, np.nan).astype("float32")
        for name, x in inputs.items()
    }
    outputs, new = layer(
        **spoiled, padding_mask=mask, cache=state, cache_update_index=0
    )
    for row, length in enumerate(real):
        alone = {name: x[row : row + 1, :length] for name, x in inputs.items()}
        expected, last = loop(**alone, state=state[row : row + 1])
        assert_close(to_numpy(outputs)[row, :length], expected[0], atol=1e-4)
        assert_close(to_numpy(new)[row], last[0], atol=1e-4)


def test_the_state_is_float32_whatever_comes_in():
    inputs = sample(5, False, False)
    state = inputs.pop("state")
    layer = LinearRecurrence(HEADS, KEY, VALUE)
    half = {name: ops.cast(x, "bfloat16") for name, x in inputs.items()}
    outputs, new = layer(**half, cache=state, cache_update_index=0)
    assert "float32" in str(outputs.dtype) and "float32" in str(new.dtype)
    for length in (1, 1000):
        cache = layer.create_cache(3, length)
        assert tuple(cache.shape) == (3, HEADS, KEY, VALUE)
