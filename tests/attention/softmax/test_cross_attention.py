"""Attention to another sequence: written once, then read."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import CrossAttention
from tests.helpers import (
    WIDTH,
    assert_close,
    compiled,
    gradients,
    raises,
    randomize,
    sample,
    to_numpy,
)

SOURCE = 7


def make(**kwargs):
    layer = CrossAttention(4, 2, **kwargs)
    layer.build((None, None, WIDTH), (None, None, 6))
    return randomize(layer)


def reference(layer, x, source, mask):
    weights = {}
    for name in ("query", "key", "value", "output"):
        dense = getattr(layer, f"{name}_dense")
        weights[name] = [to_numpy(w).astype("float64") for w in dense.weights]

    def project(name, y):
        kernel, bias = weights[name]
        return np.tensordot(y, kernel, 1) + bias

    q, k, v = project("query", x), project("key", source), project("value", source)
    heads = np.zeros(q.shape)
    for row, head in np.ndindex(len(x), 4):
        logits = q[row, :, head] @ k[row, :, head // 2].T / np.sqrt(q.shape[-1])
        exp = np.where(mask[row], np.exp(logits), 0)
        heads[row, :, head] = exp / exp.sum(-1, keepdims=True) @ v[row, :, head // 2]
    kernel, bias = weights["output"]
    return np.tensordot(heads, kernel, 2) + bias


@pytest.mark.parametrize("slots", [SOURCE, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_formula_with_and_without_a_cache(masked, slots):
    layer, x, source = make(), sample(), sample(length=SOURCE, width=6, seed=1)
    mask = np.ones((3, SOURCE), bool)
    kwargs = {}
    if masked:
        mask = np.arange(SOURCE)[None] < np.array([SOURCE, 3, 1])[:, None]
        kwargs["value_padding_mask"] = mask
        # Nobody looks at what is no token.
        spoiled = np.where(mask[..., None], source, np.nan).astype("float32")
    expected = reference(layer, x, source, mask)
    source = spoiled if masked else source
    assert_close(layer(x, source, **kwargs), expected)
    cache = layer.create_cache(3, 50, source_length=slots)
    assert {k: tuple(v.shape) for k, v in cache.items()} == {
        "key": (3, 2, 4, slots),
        "value": (3, 2, slots, 4),
        "padding_mask": (3, slots),
    }
    head, cache = layer(x[:, :5], source, cache=cache, cache_update_index=0, **kwargs)
    step = compiled(
        lambda x, cache, index: layer(x, cache=cache, cache_update_index=index)
    )
    parts = [to_numpy(head)]
    for start in range(5, x.shape[1]):
        index = ops.convert_to_tensor(start, "int32")
        before = keras.tree.map_structure(to_numpy, cache)
        outputs, cache = step(
            ops.convert_to_tensor(x[:, start : start + 1]), cache, index
        )
        parts.append(to_numpy(outputs))
        keras.tree.map_structure(
            np.testing.assert_array_equal,
            before,
            keras.tree.map_structure(to_numpy, cache),
        )
    assert_close(np.concatenate(parts, axis=1), expected)


def test_a_row_without_a_source_finds_nothing():
    layer, x, source = make(), sample(), sample(length=SOURCE, width=6, seed=1)
    mask = np.arange(SOURCE)[None] < np.array([SOURCE, 0, 3])[:, None]
    outputs = layer(x, source, value_padding_mask=mask)
    bias = to_numpy(layer.output_dense.bias)
    assert_close(outputs[1], np.broadcast_to(bias, x.shape[1:]))
    for slots in (SOURCE, 12):
        cache = layer.create_cache(3, 20, source_length=slots)
        cached, _ = layer(
            x, source, value_padding_mask=mask, cache=cache, cache_update_index=0
        )
        assert_close(cached, outputs)


def test_sources_that_do_not_fit():
    layer, x, source = make(), sample(), sample(length=SOURCE, width=6, seed=1)
    for wrong in (source[0], source[:1]):
        with raises(ValueError, "`value`", layer.name, "(batch, source_length"):
            layer(x, wrong)
    with raises(ValueError, "`value_padding_mask`", layer.name):
        layer(x, source, value_padding_mask=np.ones((3, SOURCE - 1)))
    with raises(ValueError, "`value`", "(batch, length, width)"):
        CrossAttention(4)(x, source[0])


def test_the_source_neither_grows_nor_is_taken_back():
    layer, source = make(), sample(length=SOURCE, width=6)
    cache = layer.create_cache(3, 4, source_length=SOURCE)
    _, cache = layer(sample(length=4), source, cache=cache, cache_update_index=0)
    assert layer.grow_cache(cache, 100) is cache
    assert layer.can_rewind(cache, 4, 0)


def test_training_and_saving(tmp_path):
    layer, x, source = make(dropout=0.1), sample(), sample(length=5, width=6)

    def called(x):
        return layer(x, source)

    assert np.isfinite(to_numpy(layer(x, source, training=True))).all()
    for gradient in gradients(layer, x, value=ops.convert_to_tensor(source)):
        assert np.isfinite(gradient).all()
    inputs = [keras.Input((None, WIDTH)), keras.Input((None, 6))]
    model = keras.Model(inputs, layer(*inputs))
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert_close(restored([x, source]), called(x))


def test_errors():
    layer = make()
    with raises(ValueError, "needs `value`"):
        layer(sample())
    with raises(ValueError, "7", "5", "source_length"):
        layer(
            sample(),
            sample(length=SOURCE, width=6),
            cache=layer.create_cache(3, 9, source_length=5),
            cache_update_index=0,
        )
    with raises(ValueError, "window"):
        CrossAttention(4, window=3)
