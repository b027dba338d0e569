"""Caches of a sliding window, and in 8 bits; that they decode is for the kit."""

import keras
import numpy as np
import pytest

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
from attention.caches.quantized_cache import dequantize
from blocks import CustomBackbone
from tests.helpers import (
    BATCH,
    LENGTH,
    assert_close,
    band,
    built,
    called,
    gradients,
    ragged,
    raises,
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


def pair(name, window, **kwargs):
    """A windowed layer, and one with the same weights that sees everything."""
    return [built(VARIANTS[name](**kwargs, window=x)) for x in (window, None)]


@pytest.mark.parametrize("policy", [RingCache(5), RingCache(3, keep=2)])
def test_the_cache_has_at_most_as_many_slots_as_the_window(policy):
    layer = built(RotaryAttention(4, 2, cache_policy=policy))
    caches = [layer.create_cache(3, max_length) for max_length in (1, 4, 5, 10**6)]
    grown = [layer.grow_cache(caches[0], max_length) for max_length in (3, 64)]
    for cache, slots in zip(caches + grown, (1, 4, 5, 5, 3, 5)):
        assert tuple(cache["key"].shape) == (3, 2, 4, slots)
        assert tuple(cache["value"].shape) == (3, 2, slots, 4)


@pytest.mark.parametrize("policy", [RingCache(9), RingCache(4, keep=7)])
def test_a_cache_that_is_smaller_than_the_window_grows(policy):
    layer = built(RotaryAttention(4, 2, cache_policy=policy))
    x = sample(length=14)
    expected = to_numpy(called(layer)(x))
    cache, start, outputs = layer.create_cache(3, 3), 0, []
    for size, room in ((2, 5), (1, 5), (2, 7), (2, 20), (4, 20), (1, 20), (2, 20)):
        part = x[:, start : start + size]
        chunk, cache = layer(part, cache=cache, cache_update_index=start)
        outputs.append(to_numpy(chunk))
        cache, start = layer.grow_cache(cache, room), start + size
    assert_close(np.concatenate(outputs, axis=1), expected)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences_are_computed_in_blocks(name, causal):
    """The same as with a mask, beyond twice the smallest block of 64."""
    windowed, full = pair(name, 9, causal=causal)
    length = 2 * 64 + 21
    x = sample(batch=2, length=length)
    padding = ragged(length, 83, length=length)
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


@pytest.mark.slow
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
    cache = create_cache(backbone, 2, 16)
    grown = grow_cache(call_sites(backbone), cache, 48)
    # Keys end with the slots; values, of 4 numbers a head, have them before.
    for found, slots in ((cache, 16), (grown, 48)):
        shapes = [tuple(x.shape)[2:] for x in keras.tree.flatten(found)]
        assert shapes == [(4, 4)] * 4 + [(4, slots), (slots, 4)]


@pytest.mark.slow
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


# === 8 bits ===


@pytest.mark.slow
def test_each_head_of_each_token_is_rounded_by_half_a_step():
    full, int8 = (built(RotaryAttention(4, 2, cache_dtype=x)) for x in (None, "int8"))
    exact, rounded = (
        run_chunks(layer, sample(), [7, *[1] * 5])[1] for layer in (full, int8)
    )
    assert set(rounded) == {"key", "value", "key_scale", "value_scale"}
    for name in ("key", "value"):
        x, scale = to_numpy(exact[name]), to_numpy(rounded[f"{name}_scale"])
        assert keras.backend.standardize_dtype(rounded[name].dtype) == "int8"
        back = to_numpy(dequantize(rounded[name], rounded[f"{name}_scale"], "float32"))
        assert back.shape == x.shape
        assert (np.abs(back - x) <= 0.501 * scale + 1e-5).all()
        largest = np.abs(x).max()
        assert largest > 0.5
        assert 0 < scale.max() <= largest / 127 * 1.001
    # Of 4 numbers a head in keys and values: a byte each, and a scale of four.
    for cache, each in ((exact, 4 * 4), (rounded, 4 + 4)):
        size = sum(to_numpy(x).nbytes for x in keras.tree.flatten(cache))
        assert size == BATCH * 2 * 2 * LENGTH * each
