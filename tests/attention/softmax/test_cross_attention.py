"""Attention to another sequence: written once, then read."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import CrossAttention, GroupedQueryAttention
from tests.helpers import (
    LENGTH,
    WIDTH,
    assert_close,
    attention_formula,
    built,
    compiled,
    gradients,
    ragged,
    raises,
    sample,
    to_numpy,
)

pytestmark = pytest.mark.same_everywhere

SOURCE = 7
MASK = ragged(SOURCE, 0, 3, length=SOURCE)


def make(cls=CrossAttention, **kwargs):
    """A layer, its inputs and its source."""
    layer = built(cls(4, 2, **kwargs), (None, None, WIDTH), (None, None, 6))
    return layer, sample(), sample(length=SOURCE, width=6, seed=1)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_without_a_cache_other_attention_does_the_same(mask):
    layer, x, source = make(GroupedQueryAttention, causal=False)
    mask = None if mask is None else np.repeat(mask[:, None], LENGTH, axis=1)
    expected = attention_formula(layer, x, source, True if mask is None else mask)
    assert_close(layer(x, source, attention_mask=mask), expected)


@pytest.mark.parametrize("slots", [SOURCE, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_formula_with_and_without_a_cache(masked, slots):
    layer, x, source = make()
    expected = attention_formula(layer, x, source, MASK[:, None] if masked else True)
    kwargs = {}
    if masked:
        kwargs["value_padding_mask"] = MASK
        # Nobody looks at what is no token.
        source = np.where(MASK[..., None], source, np.nan).astype("float32")
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
    before = keras.tree.map_structure(to_numpy, cache)
    for start in range(5, LENGTH):
        index = ops.convert_to_tensor(start, "int32")
        token = ops.convert_to_tensor(x[:, start : start + 1])
        outputs, cache = step(token, cache, index)
        parts.append(to_numpy(outputs))
    assert_close(np.concatenate(parts, axis=1), expected)
    after = keras.tree.map_structure(to_numpy, cache)
    keras.tree.map_structure(np.testing.assert_array_equal, before, after)


def test_the_source_neither_grows_nor_is_taken_back():
    layer, x, source = make()
    cache = layer.create_cache(3, 4, source_length=SOURCE)
    _, cache = layer(x[:, :4], source, cache=cache, cache_update_index=0)
    assert layer.grow_cache(cache, 100) is cache
    assert layer.can_rewind(cache, 4, 0)


def test_training_and_saving(tmp_path):
    layer, x, source = make(dropout=0.1)
    assert np.isfinite(to_numpy(layer(x, source, training=True))).all()
    for gradient in gradients(layer, x, value=ops.convert_to_tensor(source)):
        assert np.isfinite(gradient).all()
    inputs = [keras.Input((None, WIDTH)), keras.Input((None, 6))]
    model = keras.Model(inputs, layer(*inputs))
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert_close(restored([x, source]), layer(x, source))


def test_a_source_that_is_missing_or_another():
    layer, x, source = make()
    cache = layer.create_cache(3, 9, source_length=SOURCE)
    with raises(ValueError, "holds no source", layer.name):
        layer(x, cache=cache, cache_update_index=0)
    if keras.config.backend() != "torch":
        step = compiled(lambda x, y: layer(x, cache=y, cache_update_index=0)[0])
        assert np.isnan(to_numpy(step(ops.convert_to_tensor(x), cache))).all()
    with raises(ValueError, "`value_padding_mask`", "without a source"):
        layer(x, value_padding_mask=MASK, cache=cache, cache_update_index=0)
    _, cache = layer(x[:, :4], source, cache=cache, cache_update_index=0)
    # The same may be given again.
    again, _ = layer(x[:, 4:], source, cache=cache, cache_update_index=4)
    assert_close(again, layer(x[:, 4:], source))
    for other in ({"value": source * 2}, {"value": source, "value_padding_mask": MASK}):
        with raises(ValueError, "another source", "cache_update_index=4"):
            layer(x[:, 4:], cache=cache, cache_update_index=4, **other)


def test_keys_without_a_bias_in_eight_bits():
    layer, x, source = make(key_bias=False, cache_dtype="int8")
    assert layer.key_dense.bias is None and layer.value_dense.bias is not None
    expected = attention_formula(layer, x, source, MASK[:, None])
    cache = layer.create_cache(3, 9, source_length=SOURCE)
    given = {"value_padding_mask": MASK, "cache": cache, "cache_update_index": 0}
    head, cache = layer(x[:, :4], source, **given)
    tail, _ = layer(x[:, 4:], cache=cache, cache_update_index=4)
    found = np.concatenate([to_numpy(head), to_numpy(tail)], axis=1)
    assert_close(found, expected, atol=0.05)
    copy = CrossAttention.from_config(layer.get_config())
    assert copy.key_bias is False and copy.cache_dtype == "int8"


def test_errors():
    layer, x, source = make()
    with raises(ValueError, "needs `value`"):
        layer(x)
    with raises(ValueError, "7", "5", "source_length"):
        cache = layer.create_cache(3, 9, source_length=5)
        layer(x, source, cache=cache, cache_update_index=0)
    with raises(ValueError, "window"):
        CrossAttention(4, window=3)
    for wrong in (source[0], source[:1]):
        with raises(ValueError, "`value`", layer.name, "(batch, source_length"):
            layer(x, wrong)
    with raises(ValueError, "`value_padding_mask`", layer.name):
        layer(x, source, value_padding_mask=np.ones((3, SOURCE - 1)))
    with raises(ValueError, "`value`", "(batch, length, width)"):
        CrossAttention(4)(x, source[0])
