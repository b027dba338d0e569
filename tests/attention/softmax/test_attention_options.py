"""Options of dot product attention, each against the formula in NumPy, and together."""

import itertools

import numpy as np
import pytest

from attention import (
    GroupedQueryAttention,
    RingCache,
    RotaryPosition,
    SharedKeyValueAttention,
)
from tests.helpers import (
    BATCH,
    LENGTH,
    assert_close,
    attention_formula,
    band,
    built,
    check_outputs,
    ragged,
    sample,
    to_numpy,
)

pytestmark = pytest.mark.same_everywhere

OPTIONS = {
    "query_key_norm": True,
    "logit_soft_cap": 1.5,
    "attention_sinks": True,
    "output_gate": True,
    "window": 4,
    "position": lambda: RotaryPosition(50, rotary_dim=2),
    "value_dim": 6,
}


def make(**options):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    return built(GroupedQueryAttention(4, 2, **options))


@pytest.mark.parametrize(
    ("name", "value"),
    [*OPTIONS.items(), ("scale", 0.3), ("use_bias", False), ("output_bias", False)],
)
def test_one_option(name, value):
    layer, x = make(**{name: value}), sample()
    expected = attention_formula(layer, x)
    # It does something.
    assert np.abs(expected - attention_formula(make(), x)).max() > 1e-2
    check_outputs(layer, x, expected, [1] * LENGTH, [7, 1, 4])


@pytest.mark.parametrize("pair", itertools.combinations(OPTIONS, 2), ids="-".join)
def test_two_options(pair):
    layer, x = make(**{name: OPTIONS[name] for name in pair}), sample()
    check_outputs(layer, x, attention_formula(layer, x), [5, *[1] * 7])


def test_the_epsilon_of_query_and_key_norms():
    layer, x = make(query_key_norm=True, norm_epsilon=0.5), sample()
    assert_close(layer(x), attention_formula(layer, x))


def test_all_options():
    layer, x = make(**OPTIONS), sample()
    assert_close(layer(x), attention_formula(layer, x))
    restored = GroupedQueryAttention.from_config(layer.get_config())
    for name, value in OPTIONS.items():
        if not callable(value):
            assert getattr(restored, name) == value
    assert restored.position.rotary_dim == 2


def test_dropout_and_scores_leave_sinks_out():
    layer = make(attention_sinks=True, dropout=0.5)
    outputs, scores = layer(sample(), return_attention_scores=True)
    sums = to_numpy(scores).sum(axis=-1)
    assert (sums < 1).all() and (sums > 0).all() and sums.mean() < 0.99
    assert_close(outputs, attention_formula(layer, sample()))
    assert np.isfinite(to_numpy(layer(sample(), training=True))).all()


# === Which keys are seen ===


def test_first_tokens_that_stay_are_seen_from_everywhere():
    layer, x = make(cache_policy=RingCache(3, keep=2)), sample()
    visible = band(LENGTH, 3) | (band(LENGTH) & (np.arange(LENGTH) < 2))
    assert_close(layer(x), attention_formula(layer, x, visible=visible))
    assert layer.create_cache(1, 100)["value"].shape[2] == 5


def test_a_prefix_is_seen_in_both_directions():
    layer, x = make(position=OPTIONS["position"]), sample()
    for prefix in (5, np.array([0, 5, 9])):
        visible = band(LENGTH) | (np.arange(LENGTH) < np.reshape(prefix, (-1, 1, 1)))
        expected = attention_formula(layer, x, visible=visible)
        check_outputs(layer, x, expected, [9, 1, 2], prefix_length=prefix)


def test_padding_in_a_prefix_is_not_seen():
    layer, x, padding = make(), sample(), ragged(2, 5, 9)
    visible = (band(LENGTH) | (np.arange(LENGTH) < 9)) & padding[:, None]
    expected = attention_formula(layer, x, visible=visible)
    x = np.where(padding[..., None], x, 1e3).astype("float32")
    kwargs = {"padding_mask": padding, "prefix_length": 9}
    assert_close(to_numpy(layer(x, **kwargs))[padding], expected[padding])
    for index in (0, np.asarray(0), np.zeros(BATCH, "int32")):
        cache = layer.create_cache(BATCH, LENGTH)
        outputs, _ = layer(x, cache=cache, cache_update_index=index, **kwargs)
        assert_close(to_numpy(outputs)[padding], expected[padding])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("length", [LENGTH, 150])
def test_documents_do_not_see_each_other(window, length):
    layer, x = make(window=window, position=OPTIONS["position"]), sample(length=length)
    segments = np.cumsum(np.random.default_rng(0).random((BATCH, length)) < 0.2, axis=1)
    visible = segments[:, :, None] == segments[:, None, :]
    visible &= band(length, window)
    expected = attention_formula(layer, x, visible=visible)
    assert_close(layer(x, segment_ids=segments), expected, atol=5e-5)
    # A document of its own: positions are relative here.
    start, end = np.flatnonzero(segments[0] == segments[0, -1])[[0, -1]]
    alone = to_numpy(layer(x[:1, start : end + 1]))
    assert_close(alone, expected[:1, start : end + 1], atol=5e-5)


def test_readers_of_shared_keys_have_the_same_options():
    names = ("query_key_norm", "logit_soft_cap", "attention_sinks", "output_gate")
    options = {name: OPTIONS[name] for name in names}
    layer, x = make(**options), sample()
    reader = built(SharedKeyValueAttention(4, **options))
    for part in ("query_dense", "query_norm", "gate_dense", "output_dense"):
        getattr(reader, part).set_weights(getattr(layer, part).get_weights())
    reader.sinks.assign(layer.sinks)
    outputs, key_value = layer(x, return_key_value=True)
    assert_close(reader(x, key_value), outputs)
