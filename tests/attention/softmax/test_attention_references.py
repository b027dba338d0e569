"""Attention against Keras's own layers."""

import keras
import numpy as np
import pytest

from attention import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from tests.helpers import BATCH, LENGTH, assert_close, built, sample


def with_weights_of(reference, layer, *shapes):
    layer.build(*shapes)
    layer.set_weights(reference.get_weights())
    return layer


@pytest.mark.parametrize("value_dim", [None, 6])
@pytest.mark.parametrize("use_bias", [True, False])
def test_multi_head_attention_of_keras(use_bias, value_dim):
    x = sample()
    options = {"value_dim": value_dim, "use_bias": use_bias}
    reference = built(
        keras.layers.MultiHeadAttention(4, 4, **options), x.shape, x.shape
    )
    ours = with_weights_of(reference, MultiHeadAttention(4, **options), x.shape)
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
    reference = built(keras.layers.GroupQueryAttention(4, 4, groups), x.shape, x.shape)
    ours = with_weights_of(reference, GroupedQueryAttention(4, groups), x.shape)
    expected = reference(x, x, use_causal_mask=True)
    assert_close(ours(x), expected)
    if groups == 1:
        same = with_weights_of(reference, MultiQueryAttention(4), x.shape)
        assert_close(same(x), expected)


def test_cross_attention_of_keras():
    x, value, key = sample(), sample(length=5, width=6), sample(length=5, width=8)
    shapes = x.shape, value.shape, key.shape
    reference = built(keras.layers.MultiHeadAttention(4, 4), *shapes)
    ours = with_weights_of(reference, MultiHeadAttention(4, causal=False), *shapes)
    assert_close(ours(x, value=value, key=key), reference(x, value, key))
    mask = np.random.default_rng(1).random((BATCH, LENGTH, 5)) < 0.6
    mask[..., 0] = True
    assert_close(
        ours(x, value, key, attention_mask=mask),
        reference(x, value, key, attention_mask=mask),
    )
