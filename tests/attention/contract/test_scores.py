"""A `ScoreScope` collects the weights of attention, whatever layer computes them."""

import keras
import numpy as np
import pytest

from attention import (
    AlibiBias,
    CrossAttention,
    GroupedQueryAttention,
    LatentAttention,
    MultiHeadAttention,
    Retention,
    ScoreScope,
    SharedKeyValueAttention,
    T5Attention,
)
from blocks import CustomDecoder
from tests.helpers import assert_close, built, ragged, sample, to_numpy

LENGTH = 7
# T5's, of distances 0 to 6: 4 + int(4 * log2(distance / 4)) from 4 on.
BUCKETS = [0, 1, 2, 3, 4, 5, 6]


def weights_of(layer, x, bias=0.0, window=None, real=None):
    """The softmax of float64 products, by definition."""

    def heads(dense):
        kernel, offset = (to_numpy(w).astype("float64") for w in dense.weights)
        return np.einsum("blw,whd->bhld", x.astype("float64"), kernel) + offset[:, None]

    query, key = heads(layer.query_dense), heads(layer.key_dense)
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    logits = np.einsum("bhqd,bhkd->bhqk", query, key) * layer.scale + bias
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    visible = (distance >= 0) & (distance < (window or LENGTH))
    if real is not None:
        visible = visible & real[:, None, None, :].astype(bool)
    weights = np.where(visible, np.exp(logits), 0)
    # A padded query may see nothing.
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-9)


def alibi():
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    return -np.array([2**-2, 2**-4, 2**-6, 2**-8])[:, None, None] * np.abs(distance)


def t5(layer):
    distance = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH))
    table = to_numpy(layer.position.embeddings).astype("float64")
    return table[np.array(BUCKETS)[distance]].transpose(2, 0, 1)


CASES = {
    "grouped": lambda: (GroupedQueryAttention(4, 2, scale=0.3), {}),
    "alibi": lambda: (
        MultiHeadAttention(4, position=AlibiBias(), scale=0.3),
        {"bias": lambda _: alibi()},
    ),
    "t5": lambda: (
        T5Attention(4, num_buckets=8, max_distance=8, use_bias=True),
        {"bias": t5},
    ),
    "window": lambda: (MultiHeadAttention(4, window=3, scale=0.3), {"window": 3}),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_softmax(case, padded):
    layer, options = CASES[case]()
    built(layer)
    x = sample(length=LENGTH)
    mask = ragged(LENGTH, 4, 1, length=LENGTH) if padded else None
    outputs = layer(x, padding_mask=mask)
    with ScoreScope() as found:
        again = layer(x, padding_mask=mask)
    # Without the fused kernel.
    assert_close(again, outputs)
    [(whose, scores)] = found
    assert whose is layer
    if "bias" in options:
        options["bias"] = options["bias"](layer)
    if padded:
        x = x * mask[:, :, None]
    expected = weights_of(layer, x, real=mask, **options)
    scores = to_numpy(scores)
    real = np.ones((len(x), LENGTH), bool) if mask is None else mask.astype(bool)
    # What padded queries see doesn't count.
    scores, expected = (np.swapaxes(x, 1, 2)[real] for x in (scores, expected))
    assert_close(scores, expected)
    assert_close(scores.sum(axis=-1), np.ones(scores.shape[:-1]))
    assert (scores[expected == 0] == 0).all()


@pytest.mark.same_everywhere
def test_all_kinds_of_calls():
    """Two calls of a layer, inside of blocks too; nothing of recurrent mixers."""
    attend, cross = MultiHeadAttention(2), CrossAttention(4)
    shared, block = SharedKeyValueAttention(2), CustomDecoder(8, 2)
    latent = LatentAttention(2, latent_dim=4, rotary_dim=2)
    x, source = sample(1, 5, 8), sample(1, 3, 8)

    def run():
        y, key_value = attend(Retention(2)(attend(x)), return_key_value=True)
        y = cross(shared(y, key_value), source)
        return latent(block(y))

    run()
    with ScoreScope() as found:
        run()
    assert [(layer.name, tuple(scores.shape)) for layer, scores in found] == [
        (attend.name, (1, 2, 5, 5)),
        (attend.name, (1, 2, 5, 5)),
        (shared.name, (1, 2, 5, 5)),
        (cross.name, (1, 4, 5, 3)),
        ("self_attention", (1, 2, 5, 5)),
        (latent.name, (1, 2, 5, 5)),
    ]


def test_layers_that_are_computed_again_for_their_gradient():
    with keras.RematScope("full"):
        block = CustomDecoder(8, 2)
    x = sample(1, 5, 8)
    outputs = block(x)
    with ScoreScope() as found:
        assert_close(block(x), outputs)
    assert_close(np.sum(to_numpy(found[0][1]), axis=-1), np.ones((1, 2, 5)))
