"""Tests attention that is computed a few queries at a time."""

import numpy as np
import pytest
from keras import ops

from attention import GroupedQueryAttention
from attention.softmax.memory_efficient import memory_efficient_attention
from blocks.training.gradients import value_and_gradients


def formula(query, key, value, mask, scale):
    """Computes softmax attention in float64, head by head."""
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], 2) for x in (key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    logits = np.where(mask, logits, -np.inf)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    weights = powers / powers.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


def visible(kind, length, key_length, rng):
    """Returns a mask in which each query sees a key."""
    if kind == "causal":
        return np.tril(np.ones((1, 1, length, length), bool))
    if kind == "padding":
        return np.arange(key_length) < np.array([key_length, 3])[:, None, None, None]
    found = rng.random((2, 1, length, key_length)) < 0.3
    found[..., 0] = True
    return found


@pytest.mark.parametrize(
    "kind, length, key_length, groups",
    [
        ("causal", 300, 300, 2),
        ("causal", 128, 128, 4),
        ("padding", 200, 70, 1),
        ("any", 257, 40, 4),
        ("any", 1, 9, 2),
    ],
)
def test_outputs_and_gradients_equal_the_formula(kind, length, key_length, groups):
    rng = np.random.default_rng(0)
    shapes = (2, length, 4, 6), (2, key_length, groups, 6), (2, key_length, groups, 5)
    query, key, value = (rng.normal(size=shape) for shape in shapes)
    mask = visible(kind, length, key_length, rng)
    upstream = rng.normal(size=(2, length, 4, 5))

    def total(*arguments):
        outputs = memory_efficient_attention(
            *arguments, ops.convert_to_tensor(mask), 0.5, kind == "causal"
        )
        sums = ops.sum(outputs * ops.cast(upstream, "float32"))
        return ops.concatenate([sums[None], ops.reshape(outputs, (-1,))])

    arguments = [ops.cast(x, "float32") for x in (query, key, value)]
    found, gradients = value_and_gradients(total, arguments)

    found = ops.convert_to_numpy(found)[1:].reshape(upstream.shape)
    expected = formula(query, key, value, mask, 0.5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for i, gradient in enumerate(gradients):
        step = rng.normal(size=shapes[i])
        ends = []
        for sign in (1, -1):
            moved = [query, key, value]
            moved[i] = moved[i] + sign * 1e-6 * step
            ends.append(np.sum(upstream * formula(*moved, mask, 0.5)))
        slope = np.sum(ops.convert_to_numpy(gradient) * step)
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-4)


def test_a_layer_cuts_padded_and_packed_rows_as_it_should():
    layer, rng = GroupedQueryAttention(4, 2), np.random.default_rng(1)
    x = rng.normal(size=(2, 300, 16)).astype("float32")
    padding_mask = np.arange(300) < np.array([300, 170])[:, None]
    segment_ids = np.repeat([[1, 2, 3], [1, 1, 2]], [110, 90, 100], axis=1)
    for given in ({"padding_mask": padding_mask}, {"segment_ids": segment_ids}):
        outputs = layer(x, **given)
        # The scores are asked for, so all queries are computed at once.
        expected, _ = layer(x, return_attention_scores=True, **given)
        real = padding_mask if "padding_mask" in given else ...
        outputs, expected = map(ops.convert_to_numpy, (outputs, expected))
        np.testing.assert_allclose(outputs[real], expected[real], atol=1e-5)
