"""Prefixes that are seen in both directions: checked, and prefilled whole."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    GroupedQueryAttention,
    LatentAttention,
    RotaryAttention,
    call_sites,
)
from blocks import CustomBackbone, CustomDecoder
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    assert_close,
    compiled,
    raises,
    randomize,
    sample,
    to_numpy,
)
from tests.models import make_small_lm, next_token_logits, prompts

PREFIX = 9


class PrefixDecoder(CustomDecoder):
    def create_attention_layer(self, inputs_shape):
        return RotaryAttention(self.num_heads)

    def transform(self, x, padding_mask=None, training=None):
        x = x + self.self_attention(
            self.attention_norm(x), padding_mask=padding_mask, prefix_length=PREFIX
        )
        return x + self.ffn(self.ffn_norm(x))


class PrefixBackbone(CustomBackbone):
    def create_decoder(self, layer_index):
        return PrefixDecoder(self.intermediate_dim, self.num_heads)


def test_a_model_with_a_prefix_prefills_its_prompt_at_once():
    backbone = PrefixBackbone(60, 2, 4, 16, 32, learned_positions=False)
    assert call_sites(backbone).whole_prompt
    causal = CustomBackbone(60, 1, 4, 16, 32)
    assert not call_sites(causal).whole_prompt
    for seed, weight in enumerate(backbone.trainable_weights):
        value = np.random.default_rng(seed).normal(scale=0.3, size=weight.shape)
        weight.assign(to_numpy(weight) + value)
    lm = make_small_lm(backbone)
    rows = [list(range(1, 14)), list(range(20, 30))]  # chunks are of 3 tokens here
    state = lm.prefill(prompts(rows), max_length=20)
    expected = next_token_logits(lm, rows, 20)
    assert_close(state.logits, expected, atol=1e-4)
    tokens = ops.argmax(state.logits, axis=-1)
    logits, _ = lm.decode_step(tokens, state)
    longer = [[*row, int(token)] for row, token in zip(rows, to_numpy(tokens))]
    assert_close(logits, next_token_logits(lm, longer, 20), atol=1e-4)
    # A turn that begins after the prefix, and is longer than the cache was.
    session = lm.start(prompts(rows[:1]))
    more = prompts([[5, 6, 7, 8]])
    session.generate(more, max_new_tokens=6, stop_token_ids=None)
    found = session.tokens[0].tolist()
    start = [*rows[0], 5, 6, 7, 8]
    assert found[: len(start)] == start
    for place in range(len(start), len(found)):
        logits = next_token_logits(lm, [found[:place]], 32)[0]
        assert logits[found[place]] > logits.max() - 1e-4


@pytest.mark.parametrize("window", [None, 4])
def test_latent_attention_has_prefixes_and_documents(window):
    layer, x = LatentAttention(4, window=window), sample()
    layer.build((None, None, WIDTH))
    randomize(layer)
    near = np.ones((LENGTH, LENGTH), bool)
    if window is not None:
        places = np.arange(LENGTH)
        near = np.abs(places[:, None] - places[None]) < window
    lengths = np.array([0, 5, 9])
    visible = (
        np.tri(LENGTH, dtype=bool)[None]
        | (np.arange(LENGTH) < lengths[:, None])[:, None]
    )

    def of_plain(visible):
        # The same weights without causality: the mask says it all.
        plain = LatentAttention.from_config(layer.get_config())
        plain.causal, plain.window = False, None
        plain.build((None, None, WIDTH))
        plain.set_weights(layer.get_weights())
        return plain(x, attention_mask=visible & near)

    expected = of_plain(visible)
    assert_close(layer(x, prefix_length=lengths), expected)
    cache = layer.create_cache(BATCH, LENGTH)
    head, cache = layer(
        x[:, :PREFIX], prefix_length=lengths, cache=cache, cache_update_index=0
    )
    tail, _ = layer(
        x[:, PREFIX:],
        prefix_length=lengths,
        cache=cache,
        cache_update_index=np.full((BATCH,), PREFIX, "int32"),
    )
    assert_close(np.concatenate([to_numpy(y) for y in (head, tail)], 1), expected)
    segments = np.arange(LENGTH)[None] // np.array([2, 5, LENGTH])[:, None]
    visible = segments[:, :, None] == segments[:, None]
    expected = of_plain(visible & np.tri(LENGTH, dtype=bool))
    assert_close(layer(x, segment_ids=segments), expected)


@pytest.mark.parametrize("make", [GroupedQueryAttention, LatentAttention])
def test_what_begins_within_a_prefix_is_refused(make):
    layer, x = make(4, 2) if make is GroupedQueryAttention else make(4), sample()
    layer(x)
    cache = layer.create_cache(BATCH, LENGTH)
    options = {"prefix_length": np.array([2, 4, 9]), "cache": cache}
    with raises(ValueError, "begins within the prefix", "cache_update_index=0"):
        layer(x[:, :3], cache_update_index=np.asarray([3, 3, 3]), **options)

    def step(x, cache, index):
        return layer(x, cache=cache, cache_update_index=index, prefix_length=4)[0]

    if keras.config.backend() != "torch":
        index = np.array([0, 3, 4], "int32")
        outputs = to_numpy(compiled(step)(x[:, :3], cache, index))
        # Where it can't be said before: NaN for that row, and that row only.
        assert np.isnan(outputs).all(axis=(1, 2)).tolist() == [False, True, False]
        assert np.isfinite(outputs[[0, 2]]).all()


def test_errors():
    layer, x = GroupedQueryAttention(4, 2), sample()
    for prefix, kind in (
        (2.5, TypeError),
        ("2", TypeError),
        (np.ones(BATCH, "float32"), TypeError),
        (-1, ValueError),
        (np.ones(BATCH + 1, "int32"), ValueError),
        (np.ones((BATCH, 1), "int32"), ValueError),
    ):
        with raises(kind, "`prefix_length`", layer.name):
            layer(x, prefix_length=prefix)
    for segments, kind in (
        (np.zeros((BATCH, LENGTH)), TypeError),
        (3, TypeError),
        (np.zeros((BATCH, LENGTH - 1), "int32"), ValueError),
        (np.zeros((LENGTH,), "int32"), ValueError),
    ):
        with raises(kind, "`segment_ids`", layer.name):
            layer(x, segment_ids=segments)
    lists = [[0] * LENGTH] * BATCH
    assert_close(layer(x, segment_ids=lists), layer(x))
