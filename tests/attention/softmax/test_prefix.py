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
    assert_close,
    band,
    built,
    check_outputs,
    compiled,
    raises,
    sample,
    to_numpy,
)
from tests.models import (
    brute_force_greedy,
    make_backbone,
    make_small_lm,
    next_token_logits,
    prompts,
)

pytestmark = pytest.mark.same_everywhere

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


@pytest.mark.slow
def test_a_model_with_a_prefix_prefills_its_prompt_at_once():
    backbone = make_backbone(PrefixBackbone, learned_positions=False)
    assert call_sites(backbone).whole_prompt
    assert not call_sites(make_backbone(num_layers=1)).whole_prompt
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
    assert found == brute_force_greedy(lm, [[*rows[0], 5, 6, 7, 8]], [len(found)])[0]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.slow
def test_latent_attention_has_prefixes_and_documents(window):
    layer, x = built(LatentAttention(4, window=window)), sample()
    # The same weights without causality: the mask says it all.
    plain = LatentAttention.from_config({**layer.get_config(), "window": None})
    plain.causal = False
    built(plain).set_weights(layer.get_weights())
    near = band(LENGTH, window, causal=False)
    visible = band(LENGTH) | (np.arange(LENGTH) < np.array([[[0]], [[5]], [[9]]]))
    expected = plain(x, attention_mask=visible & near)
    lengths = np.array([0, 5, 9])
    check_outputs(layer, x, expected, [PREFIX, 1, 2], prefix_length=lengths)
    segments = np.arange(LENGTH)[None] // np.array([2, 5, LENGTH])[:, None]
    visible = (segments[:, :, None] == segments[:, None]) & band(LENGTH, window)
    assert_close(layer(x, segment_ids=segments), plain(x, attention_mask=visible))


@pytest.mark.parametrize(
    "make", [lambda: GroupedQueryAttention(4, 2), lambda: LatentAttention(4)]
)
def test_what_begins_within_a_prefix_is_refused(make):
    layer, x = built(make()), sample()
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


@pytest.mark.parametrize(
    "name, value, kind",
    [
        ("prefix_length", 2.5, TypeError),
        ("prefix_length", "2", TypeError),
        ("prefix_length", np.ones(BATCH, "float32"), TypeError),
        ("prefix_length", -1, ValueError),
        ("prefix_length", np.ones(BATCH + 1, "int32"), ValueError),
        ("prefix_length", np.ones((BATCH, 1), "int32"), ValueError),
        ("segment_ids", np.zeros((BATCH, LENGTH)), TypeError),
        ("segment_ids", 3, TypeError),
        ("segment_ids", np.zeros((BATCH, LENGTH - 1), "int32"), ValueError),
        ("segment_ids", np.zeros((LENGTH,), "int32"), ValueError),
    ],
)
def test_errors(name, value, kind):
    layer = GroupedQueryAttention(4, 2)
    with raises(kind, f"`{name}`", layer.name):
        layer(sample(), **{name: value})


def test_segment_ids_may_be_lists():
    layer, x = GroupedQueryAttention(4, 2), sample()
    assert_close(layer(x, segment_ids=[[0] * LENGTH] * BATCH), layer(x))
