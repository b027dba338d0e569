"""Options of dot product attention, each against the formula in NumPy, and together."""

import itertools

import numpy as np
import pytest

from attention import (
    GroupedQueryAttention,
    MultiHeadAttention,
    RotaryAttention,
    RotaryPosition,
    SharedKeyValueAttention,
)
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    assert_close,
    called,
    raises,
    randomize,
    rms_norm,
    rotate,
    run_chunks,
    sample,
    to_numpy,
)

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
    layer = GroupedQueryAttention(4, 2, **options)
    layer.build((None, None, WIDTH))
    return randomize(layer)


def weights_of(layer, part):
    """The weights of one of the layer's parts, by their names."""
    return {w.name: to_numpy(w).astype("float64") for w in getattr(layer, part).weights}


def project(layer, part, x):
    weights = weights_of(layer, part)
    return np.tensordot(x, weights["kernel"], 1) + weights["bias"]


def reference(layer, x, visible=None):
    """One head of one row at a time, as the papers have it."""
    x = x.astype("float64")
    q, k, v = (project(layer, f"{n}_dense", x) for n in ("query", "key", "value"))
    if layer.query_key_norm:
        q, k = (
            rms_norm(y, weights_of(layer, part)["scale"], 1e-6)
            for y, part in ((q, "query_norm"), (k, "key_norm"))
        )
    if layer.position is not None:
        dim = layer.position.rotary_dim
        q, k = (np.stack([rotate(row, 50, dim) for row in y]) for y in (q, k))
    length = x.shape[1]
    if visible is None:
        visible = np.tri(length, dtype=bool)
        if layer.window is not None:
            visible = visible & ~np.tri(length, k=-layer.window, dtype=bool)
        visible = np.tile(visible, (len(x), 1, 1))
    heads = np.zeros((*q.shape[:3], v.shape[-1]))
    for row, head in itertools.product(range(len(x)), range(layer.num_heads)):
        group = head // (layer.num_heads // layer.num_key_value_heads)
        logits = q[row, :, head] @ k[row, :, group].T / np.sqrt(q.shape[-1])
        if layer.logit_soft_cap is not None:
            logits = layer.logit_soft_cap * np.tanh(logits / layer.logit_soft_cap)
        weights = np.where(visible[row], np.exp(logits), 0)
        total = weights.sum(axis=-1, keepdims=True)
        if layer.attention_sinks:
            total = total + np.exp(to_numpy(layer.sinks)[head])
        heads[row, :, head] = weights / total @ v[row, :, group]
    if layer.output_gate:
        heads = heads / (1 + np.exp(-project(layer, "gate_dense", x)))
    weights = weights_of(layer, "output_dense")
    return np.tensordot(heads, weights["kernel"], 2) + weights["bias"]


@pytest.mark.parametrize("name", OPTIONS)
def test_one_option(name):
    layer, x = make(**{name: OPTIONS[name]}), sample()
    expected = reference(layer, x)
    # It does something.
    assert np.abs(expected - reference(make(), x)).max() > 1e-2
    assert_close(called(layer)(x), expected)
    for sizes in ([1] * LENGTH, [7, 1, 4]):
        outputs, _ = run_chunks(layer, x, sizes, ("int", "scalar", "rows", "rows"))
        assert_close(outputs, expected)


@pytest.mark.parametrize("pair", itertools.combinations(OPTIONS, 2), ids="-".join)
def test_two_options(pair):
    layer, x = make(**{name: OPTIONS[name] for name in pair}), sample()
    expected = reference(layer, x)
    assert_close(called(layer)(x), expected)
    outputs, _ = run_chunks(layer, x, [5, *[1] * 7], ("int", "rows"))
    assert_close(outputs, expected)


def test_all_options():
    layer, x = make(**OPTIONS), sample()
    assert_close(layer(x), reference(layer, x))
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
    assert_close(outputs, reference(layer, sample()))
    assert np.isfinite(to_numpy(layer(sample(), training=True))).all()


# === Which keys are seen ===


def test_a_prefix_is_seen_in_both_directions():
    layer, x = make(position=OPTIONS["position"]), sample()
    lengths = np.array([0, 5, 9])
    keys = np.arange(LENGTH)
    visible = np.tri(LENGTH, dtype=bool) | (keys < lengths[:, None])[:, None]
    expected = reference(layer, x, visible)
    assert_close(layer(x, prefix_length=lengths), expected)
    one_for_all = np.tri(LENGTH, dtype=bool) | (keys < 5)
    one_for_all = reference(layer, x, np.tile(one_for_all, (BATCH, 1, 1)))
    assert_close(layer(x, prefix_length=5), one_for_all)
    # The prefix in one call, what follows in steps of its own.
    cache, parts = layer.create_cache(BATCH, LENGTH), []
    for start, size in ((0, 9), (9, 1), (10, 2)):
        outputs, cache = layer(
            x[:, start : start + size],
            prefix_length=lengths,
            cache=cache,
            cache_update_index=np.asarray(start),
        )
        parts.append(to_numpy(outputs))
    assert_close(np.concatenate(parts, axis=1), expected)


def test_padding_in_a_prefix_is_not_seen():
    layer, x = make(), sample()
    real = np.array([2, 5, 9])
    padding = np.arange(LENGTH)[None] < real[:, None]
    visible = np.tri(LENGTH, dtype=bool) | (np.arange(LENGTH) < 9)
    visible = visible[None] & padding[:, None]
    expected = reference(layer, x, visible)
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
    visible &= np.tri(length, dtype=bool)
    if window is not None:
        visible &= ~np.tri(length, k=-window, dtype=bool)
    expected = reference(layer, x, visible)
    assert_close(layer(x, segment_ids=segments), expected, atol=5e-5)
    # A document of its own: positions are relative here.
    start, end = np.flatnonzero(segments[0] == segments[0, -1])[[0, -1]]
    alone = to_numpy(layer(x[:1, start : end + 1]))
    assert_close(alone, expected[:1, start : end + 1], atol=5e-5)
    with raises(ValueError, "segment_ids", "cache"):
        layer(
            x,
            segment_ids=segments,
            cache=layer.create_cache(BATCH, length),
            cache_update_index=0,
        )


def test_readers_of_shared_keys_have_the_same_options():
    names = ("query_key_norm", "logit_soft_cap", "attention_sinks", "output_gate")
    options = {name: OPTIONS[name] for name in names}
    layer, x = make(**options), sample()
    reader = SharedKeyValueAttention(4, **options)
    reader.build(x.shape)
    for part in ("query_dense", "query_norm", "gate_dense", "output_dense"):
        getattr(reader, part).set_weights(getattr(layer, part).get_weights())
    reader.sinks.assign(layer.sinks)
    outputs, key_value = layer(x, return_key_value=True)
    assert_close(reader(x, key_value), outputs)


def test_errors():
    for cap in (0, -1.0):
        with raises(ValueError, "logit_soft_cap", str(cap)):
            MultiHeadAttention(4, logit_soft_cap=cap)
    with raises(TypeError, "logit_soft_cap"):
        MultiHeadAttention(4, logit_soft_cap="50")
    with raises(ValueError, "3"):
        RotaryAttention(4, rotary_dim=3)
    with raises(ValueError, "rotary_dim", "6", "4"):
        RotaryAttention(4, rotary_dim=6)(sample())
