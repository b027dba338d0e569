"""Attention against Keras's own layers, and against the formula in NumPy."""

import keras
import numpy as np
import pytest

from attention import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from tests.helpers import BATCH, LENGTH, assert_close, make, randomize, sample


def dense(x, layer):
    """`(batch, length, width)` to `(batch, length, heads, dim)`."""
    kernel, bias = (keras.ops.convert_to_numpy(w) for w in layer.weights)
    return np.tensordot(x, kernel, 1) + bias


def softmax_attention(layer, x, source=None, causal=True, mask=None, scale=None):
    """Attention as its paper has it, one head of one row at a time."""
    source = x if source is None else source
    query = dense(x, layer.query_dense)
    key, value = dense(source, layer.key_dense), dense(source, layer.value_dense)
    shared = query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = np.zeros((*query.shape[:3], value.shape[-1]))
    for row in range(len(x)):
        for head in range(query.shape[2]):
            logits = query[row, :, head] @ key[row, :, head // shared].T * scale
            allowed = np.ones(logits.shape, bool) if mask is None else mask[row]
            if causal:
                allowed = allowed & np.tri(*logits.shape, dtype=bool)
            weights = np.where(allowed, np.exp(logits), 0)
            weights = weights / weights.sum(axis=-1, keepdims=True)
            heads[row, :, head] = weights @ value[row, :, head // shared]
    kernel, bias = (keras.ops.convert_to_numpy(w) for w in layer.output_dense.weights)
    return np.tensordot(heads, kernel, 2) + bias


@pytest.mark.parametrize(
    "name",
    ["multi_head", "multi_query", "grouped", "value_dim"],
)
def test_against_the_formula(name):
    layer, x = make(name), sample()
    assert_close(layer(x), softmax_attention(layer, x))
    mask = np.random.default_rng(1).random((BATCH, LENGTH, LENGTH)) < 0.6
    mask |= np.eye(LENGTH, dtype=bool)
    expected = softmax_attention(layer, x, mask=mask)
    assert_close(layer(x, attention_mask=mask), expected)


@pytest.mark.parametrize(
    ("layer", "scale"),
    [
        (lambda: GroupedQueryAttention(4, 2, value_dim=6), None),
        (lambda: MultiHeadAttention(4, scale=0.3), 0.3),
    ],
)
def test_sizes_and_scales(layer, scale):
    layer, x = layer(), sample()
    layer.build(x.shape)
    assert_close(layer(x), softmax_attention(layer, x, scale=scale))


def test_cross_attention_against_the_formula():
    layer = GroupedQueryAttention(4, 2, causal=False)
    x, source = sample(), sample(length=5, width=6, seed=1)
    layer.build(x.shape, source.shape)
    assert_close(layer(x, source), softmax_attention(layer, x, source, causal=False))
    mask = np.arange(5)[None, None] < np.array([5, 3, 1])[:, None, None]
    expected = softmax_attention(
        layer, x, source, causal=False, mask=np.repeat(mask, LENGTH, 1)
    )
    assert_close(layer(x, source, attention_mask=mask), expected)


def with_weights_of(reference, layer, *shapes):
    layer.build(*shapes)
    layer.set_weights(reference.get_weights())
    return layer


@pytest.mark.parametrize("value_dim", [None, 6])
@pytest.mark.parametrize("use_bias", [True, False])
def test_multi_head_attention_of_keras(use_bias, value_dim):
    x = sample()
    reference = keras.layers.MultiHeadAttention(
        4, 4, value_dim=value_dim, use_bias=use_bias
    )
    reference.build(x.shape, x.shape)
    randomize(reference)
    ours = MultiHeadAttention(4, value_dim=value_dim, use_bias=use_bias)
    with_weights_of(reference, ours, x.shape)
    # With the scores, as Keras's layer fails on JAX without them for a `value_dim`
    # other than `key_dim`.
    expected = reference(x, x, use_causal_mask=True, return_attention_scores=True)
    assert_close(ours(x), expected[0])
    outputs, scores = ours(x, return_attention_scores=True)
    assert_close(outputs, expected[0])
    assert_close(scores, expected[1])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_query_attention_of_keras(groups):
    x = sample()
    reference = keras.layers.GroupQueryAttention(4, 4, groups)
    reference.build(x.shape, x.shape)
    randomize(reference)
    ours = with_weights_of(reference, GroupedQueryAttention(4, groups), x.shape)
    expected = reference(x, x, use_causal_mask=True)
    assert_close(ours(x), expected)
    if groups == 1:
        same = with_weights_of(reference, MultiQueryAttention(4), x.shape)
        assert_close(same(x), expected)


def test_cross_attention_of_keras():
    x, value, key = sample(), sample(length=5, width=6), sample(length=5, width=8)
    reference = keras.layers.MultiHeadAttention(4, 4)
    reference.build(x.shape, value.shape, key.shape)
    randomize(reference)
    ours = MultiHeadAttention(4, causal=False)
    with_weights_of(reference, ours, x.shape, value.shape, key.shape)
    assert_close(ours(x, value=value, key=key), reference(x, value, key))
    mask = np.random.default_rng(1).random((BATCH, LENGTH, 5)) < 0.6
    mask[..., 0] = True
    assert_close(
        ours(x, value, key, attention_mask=mask),
        reference(x, value, key, attention_mask=mask),
    )
