"""Sliding windows: a banded mask over all keys, from a cache of `window` slots."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    AlibiBias,
    GroupedQueryAttention,
    MultiHeadAttention,
    RingCache,
    RotaryAttention,
    T5Attention,
    call_sites,
    create_cache,
    grow_cache,
)
from blocks import CustomBackbone
from tests.helpers import (
    LENGTH,
    WIDTH,
    assert_close,
    called,
    compiled_on_jax,
    gradients,
    raises,
    randomize,
    run_chunks,
    sample,
    to_numpy,
)
from tests.models import (
    brute_force_greedy,
    make_backbone,
    make_small_lm,
    prompts,
)

VARIANTS = {
    "multi_head": lambda **kwargs: MultiHeadAttention(4, **kwargs),
    "multi_query_values": lambda **kwargs: GroupedQueryAttention(
        4, 1, value_dim=6, **kwargs
    ),
    "rotary": lambda **kwargs: RotaryAttention(4, 2, **kwargs),
    "t5": lambda **kwargs: T5Attention(4, num_buckets=8, max_distance=10, **kwargs),
    "alibi": lambda **kwargs: MultiHeadAttention(4, position=AlibiBias(), **kwargs),
}


def band(length, window, causal=True):
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = distance < window
    return visible & (distance >= 0) if causal else visible & (distance > -window)


def pair(name, window, **kwargs):
    """A windowed layer, and one with the same weights that sees everything."""
    windowed, full = (VARIANTS[name](**kwargs, window=x) for x in (window, None))
    return randomize(built(windowed)), randomize(built(full))


def built(layer):
    layer.build((None, None, WIDTH))
    return layer


def over_a_full_cache(layer, x, mask):
    """Token by token, each with its row of the mask."""
    cache, parts = layer.create_cache(len(x), x.shape[1]), []

    def step(x, mask, cache, index):
        return layer(x, attention_mask=mask, cache=cache, cache_update_index=index)

    step = compiled_on_jax(step)
    for i in range(x.shape[1]):
        at, index = slice(i, i + 1), ops.convert_to_tensor(i, "int32")
        outputs, cache = step(x[:, at], mask[:, at], cache, index)
        parts.append(to_numpy(outputs))
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("name", ["multi_query_values", "rotary", "t5"])
def test_it_equals_a_banded_mask(name, window):
    windowed, full = pair(name, window)
    length = 5 * window + 4
    x = sample(length=length)
    mask = np.tile(band(length, window), (len(x), 1, 1))
    expected = full(x, attention_mask=mask)
    assert_close(windowed(x), expected)
    # Over a full cache, in steps, and well past three windows.
    cached = over_a_full_cache(full, x, mask)
    kinds = ("int", *["scalar"] * 4, *["rows"] * 100)
    for sizes in (
        [1] * length,
        [length - 2, 1, 1],
        [window + 2, 1, 1, *[2] * ((length - window - 4) // 2)],
    ):
        outputs, cache = run_chunks(windowed, x, sizes, kinds)
        assert_close(outputs, to_numpy(expected)[:, : sum(sizes)])
        assert_close(outputs, cached[:, : sum(sizes)])
        assert cache["value"].shape[2] == cache["key"].shape[3] == window


def test_first_tokens_that_stay_are_seen_from_everywhere():
    keeping = RotaryAttention(4, 2, cache_policy=RingCache(3, keep=2))
    full = RotaryAttention(4, 2)
    x = sample()
    for layer in (keeping, full):
        layer.build(x.shape)
    randomize(keeping)
    full.set_weights(keeping.get_weights())
    mask = band(LENGTH, 3) | (np.tri(LENGTH, dtype=bool) & (np.arange(LENGTH) < 2))
    assert_close(keeping(x), full(x, attention_mask=mask[None]))
    assert keeping.create_cache(1, 100)["value"].shape[2] == 5


def test_the_cache_has_as_many_slots_as_the_window():
    layer = built(RotaryAttention(4, 2, window=5))
    sizes = set()
    for max_length in (2, 5, 100, 10**6):
        cache = layer.create_cache(3, max_length)
        sizes.add(tuple(int(np.prod(x.shape)) for x in keras.tree.flatten(cache)))
    assert sizes == {(3 * 2 * 4 * 5, 3 * 2 * 4 * 5)}
    grown = layer.grow_cache(layer.create_cache(3, 8), 64)
    assert tuple(grown["value"].shape) == (3, 2, 5, 4)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences_are_computed_in_blocks(name, causal):
    """The same as with a mask, beyond twice the smallest block of 64."""
    windowed, full = pair(name, 9, causal=causal)
    length = 2 * 64 + 21
    x = sample(batch=2, length=length)
    padding = np.arange(length)[None] < np.array([length, 83])[:, None]
    # The mask, and scores, need all pairs: both are computed without blocks.
    mask = np.tile(band(length, 9, causal), (2, 1, 1))
    masks = {"attention_mask": mask, "padding_mask": padding}
    expected = to_numpy(called(full, **masks)(x))
    outputs = to_numpy(called(windowed, padding_mask=padding)(x))
    assert_close(outputs[padding], expected[padding], atol=5e-5)
    scored = {"padding_mask": padding, "return_attention_scores": True}
    again, _ = called(windowed, **scored)(x)
    assert_close(to_numpy(again)[padding], expected[padding], atol=5e-5)
    found = gradients(windowed, x), gradients(full, x, attention_mask=mask)
    # A bias of all keys alike has no gradient but rounding.
    scale = max(np.abs(gradient).max() for gradient in found[1])
    for ours, theirs in zip(*found):
        assert_close(ours / scale, theirs / scale, atol=1e-5)


def test_scores_of_a_cache_are_those_of_its_slots_and_of_the_new_tokens():
    windowed, full = pair("rotary", 4)
    x = sample()
    mask = np.tile(band(LENGTH, 4), (3, 1, 1))
    _, expected = full(x, attention_mask=mask, return_attention_scores=True)
    expected = to_numpy(expected)
    cache = windowed.create_cache(3, LENGTH)
    (_, scores), cache = windowed(
        x[:, :6], cache=cache, cache_update_index=0, return_attention_scores=True
    )
    assert scores.shape == (3, 4, 6, 4 + 6)
    assert_close(scores[..., 4:], expected[:, :, :6, :6])
    (_, scores), _ = windowed(
        x[:, 6:9], cache=cache, cache_update_index=6, return_attention_scores=True
    )
    # The slots hold the positions 4, 5, 2 and 3.
    scores = to_numpy(scores)[..., [2, 3, 0, 1, 4, 5, 6]]
    assert_close(scores, expected[:, :, 6:9, 2:9])


class LocalAndGlobal(CustomBackbone):
    """One layer that sees everything above two with a window, as in Gemma."""

    def create_attention_layer(self, inputs_shape, layer_index):
        window = None if layer_index == 2 else 4
        base = 10_000 if window else 50_000
        return RotaryAttention(self.num_heads, 2, max_wavelength=base, window=window)


def local_and_global():
    return make_backbone(LocalAndGlobal, num_layers=3)


def test_only_layers_without_a_window_grow():
    backbone = local_and_global()
    slots = [x["value"].shape[2] for x in leaves(create_cache(backbone, 2, 16))]
    assert slots == [4, 4, 16]
    sites = call_sites(backbone)
    grown = grow_cache(sites, create_cache(backbone, 2, 16), 48)
    assert [x["value"].shape[2] for x in leaves(grown)] == [4, 4, 48]


def leaves(cache):
    """The dicts of keys and values, in the order of the layers."""
    if isinstance(cache, dict) and "value" in cache:
        return [cache]
    parts = cache.values() if isinstance(cache, dict) else cache
    return [leaf for part in parts for leaf in leaves(part)]


def test_a_session_takes_back_only_what_a_window_still_holds():
    lm = make_small_lm(local_and_global())
    session = lm.start(prompts([[5, 6, 7]]))
    session.generate(max_new_tokens=9, stop_token_ids=None)
    with raises(ValueError, "can't go back", "has dropped"):
        session.trim(5)
    short = lm.start(prompts([[5, 6, 7]]))
    short.trim(2)
    again = short.generate(prompts([[9]]), max_new_tokens=6, stop_token_ids=None)
    expected = brute_force_greedy(lm, [[5, 9]], [8])
    assert [row.tolist() for row in again] == [expected[0][-6:]]


def test_configuration_and_errors():
    layer = RotaryAttention(4, 2, window=7)
    assert RotaryAttention.from_config(layer.get_config()).window == 7
    for window in (0, -1):
        with raises(ValueError, "window", str(window)):
            MultiHeadAttention(4, window=window)
    for window in ("3", 2.0):
        with raises(TypeError, "window"):
            MultiHeadAttention(4, window=window)
