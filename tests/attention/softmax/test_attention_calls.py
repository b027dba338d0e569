"""Attention layers, beyond the checks of `test_conformance.py` for every layer:
masks, scores, rewinding, and padding that holds NaN."""

import keras
import numpy as np
import pytest
from keras import ops, tree

import attention.testing.backends as backends
from attention import GroupedQueryAttention, MultiHeadAttention
from tests.helpers import (
    BATCH,
    LENGTH,
    as_index,
    assert_close,
    attention_formula,
    band,
    gradients,
    make,
    ragged,
    sample,
    slow,
    to_numpy,
)

few_attentions = pytest.mark.parametrize(
    "name", [slow("multi_head"), "rotary", "t5", slow("alibi")]
)
GARBAGE = np.array([np.nan, np.inf, 1e30])[:, None, None]


def with_garbage(x, mask):
    """Puts something else into the padded tokens of each row."""
    return np.where(mask[..., None], x, GARBAGE).astype("float32")


@pytest.mark.parametrize("name", ["rotary", "t5", "position_embedding", "composite"])
def test_padding_may_hold_anything(name):
    """The conformance suite has large numbers there; here it is NaN and infinity."""
    layer, x = make(name), sample()
    mask = ragged(11, 5, 1)
    full, padded = to_numpy(layer(x)), with_garbage(x, mask)
    assert_close(to_numpy(layer(padded, padding_mask=mask))[mask], full[mask])
    for kind in ("int", "rows"):
        outputs, cache = layer(
            padded,
            padding_mask=mask,
            cache=layer.create_cache(BATCH, LENGTH),
            cache_update_index=as_index(kind, 0),
        )
        assert_close(to_numpy(outputs)[mask], full[mask])
    if name not in ("position_embedding", "composite"):
        assert all(np.isfinite(to_numpy(leaf)).all() for leaf in tree.flatten(cache))


def test_padded_tokens_are_not_seen_by_a_layer_that_is_not_causal():
    layer = MultiHeadAttention(4, causal=False)
    x = sample()
    mask = ragged(11, 5, 1)
    outputs = layer(with_garbage(x, mask), padding_mask=mask)
    assert_close(outputs[1, :5], layer(x[1:2, :5])[0])


def random_mask(seed=3):
    mask = np.random.default_rng(seed).random((BATCH, LENGTH, LENGTH)) < 0.6
    mask[0, 6] = False  # a query that may attend to nothing
    mask[1, 4] = False
    mask[1, 4, 9] = True  # a query that may attend to a later token only
    return mask


@few_attentions
@pytest.mark.slow
def test_attention_mask_with_a_cache_and_without(name):
    layer, x, mask = make(name), sample(), random_mask()
    full = to_numpy(layer(x, attention_mask=mask))
    assert np.isfinite(full).all()
    for kind in ("int", "scalar", "rows"):
        cache, outputs = layer.create_cache(BATCH, LENGTH), []
        for start, size in ((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1)):
            rows = slice(start, start + size)
            chunk, cache = layer(
                x[:, rows],
                # Its columns count positions; those not reached play no role.
                attention_mask=mask[:, rows, : 8 if start < 8 else LENGTH],
                cache=cache,
                cache_update_index=as_index(kind, start),
            )
            outputs.append(to_numpy(chunk))
        assert_close(np.concatenate(outputs, axis=1), full)


def test_a_query_that_may_attend_to_nothing_finds_nothing():
    layer, x, mask = make("multi_head"), sample(), random_mask()
    expected = attention_formula(layer, x, visible=mask & band(LENGTH))
    outputs, scores = layer(x, attention_mask=mask, return_attention_scores=True)
    assert_close(outputs, expected)
    assert_close(layer(x, attention_mask=mask), expected)
    assert_close(scores[0, :, 6], np.zeros((4, LENGTH)))


@few_attentions
def test_attention_scores_with_a_cache_and_without(name):
    layer, x = make(name), sample()
    outputs, scores = layer(x, return_attention_scores=True)
    assert_close(outputs, layer(x))
    heads = layer.num_heads
    assert tuple(scores.shape) == (BATCH, heads, LENGTH, LENGTH)
    assert_close(ops.sum(scores, axis=-1), np.ones((BATCH, heads, LENGTH)))
    assert_close(scores, np.tril(to_numpy(scores)), atol=0)
    cache = layer.create_cache(BATCH, LENGTH)
    (head, head_scores), cache = layer(
        x[:, :4], cache=cache, cache_update_index=0, return_attention_scores=True
    )
    (tail, tail_scores), cache = layer(
        x[:, 4:5], cache=cache, cache_update_index=4, return_attention_scores=True
    )
    assert_close(head, outputs[:, :4])
    assert_close(tail, outputs[:, 4:5])
    assert_close(head_scores, scores[:, :, :4])
    assert_close(tail_scores, scores[:, :, 4:5])


@few_attentions
def test_fused_attention_equals_the_explicit_one(name):
    layer, x = make(name), sample()
    mask = ragged(12, 5, 1)
    both = {"padding_mask": mask, "attention_mask": random_mask()}
    for given in ({}, both):
        fused = to_numpy(layer(x, **given))
        # The scores are asked for, so the fused kernel can't be used.
        explicit, _ = layer(x, return_attention_scores=True, **given)
        assert_close(fused[mask], to_numpy(explicit)[mask])


@pytest.mark.parametrize("name", ["t5", "position_embedding"])
def test_gradients_are_finite_whatever_the_padding_holds(name):
    layer, x = make(name), sample()
    mask = ragged(11, 5, 0)
    padded = ops.convert_to_tensor(with_garbage(x, mask))
    values = gradients(layer, padded, padding_mask=mask)
    assert len(values) == len(layer.trainable_variables)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in values)


def test_dropout_only_in_training():
    layer, x = GroupedQueryAttention(4, 2, dropout=0.5), sample()
    plain = to_numpy(layer(x))
    assert_close(layer(x, training=False), plain)
    dropped = to_numpy(layer(x, training=True))
    assert np.abs(dropped - plain).max() > 1e-3
    assert np.abs(to_numpy(layer(x, training=True)) - dropped).max() > 1e-3
    # The scores that are returned are those before dropout.
    _, scores = layer(x, training=True, return_attention_scores=True)
    assert_close(ops.sum(scores, axis=-1), np.ones((BATCH, 4, LENGTH)))


@pytest.mark.parametrize("start", [0, 3, 9])
def test_gradients_flow_through_slice_update(start):
    """TensorFlow has none of its own; a slice that does not fit is moved."""
    if start == 9 and keras.config.backend() == "torch":
        pytest.skip("torch takes no slice that does not fit")
    rng = np.random.default_rng(0)
    cache, update = rng.normal(size=(2, 8, 3)), rng.normal(size=(2, 2, 3))
    weights = rng.normal(size=cache.shape)
    first = min(start, 6)

    def loss(tensors):
        old, new = tensors
        written = ops.slice_update(old, ops.convert_to_tensor([0, start, 0]), new)
        return ops.sum(written * ops.convert_to_tensor(weights))

    found = backends.gradients(loss, [], [cache, update])
    kept = np.ones(cache.shape)
    kept[:, first : first + 2] = 0
    assert_close(found[0], weights * kept)
    assert_close(found[1], weights[:, first : first + 2])
