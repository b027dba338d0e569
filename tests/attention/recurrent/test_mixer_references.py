"""Mixers against their papers' formulas in NumPy, and against KerasHub's RWKV-7."""

import keras_hub
import numpy as np
import pytest
from keras import ops

from attention import (
    DifferentialAttention,
    LatentAttention,
    Retention,
    RotaryPosition,
    RWKVChannelMix,
    RWKVTimeMix,
)
from tests.helpers import (
    WIDTH,
    assert_close,
    called,
    randomize,
    rms_norm,
    rotate,
    run_chunks,
    sample,
    to_numpy,
)


def kernels(layer, *parts):
    return [to_numpy(getattr(layer, f"{p}_dense").kernel).astype("f8") for p in parts]


def softmax(x, mask):
    x = np.where(mask, np.exp(x), 0)
    return x / x.sum(axis=-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def check(layer, x, expected, atol=2e-5):
    """Without a cache, and with one in steps and chunks."""
    assert_close(called(layer)(x), expected, atol)
    for sizes in ([1] * x.shape[1], [5, 1, *[2] * ((x.shape[1] - 6) // 2)]):
        outputs, _ = run_chunks(layer, x, sizes, ("int", "scalar", "rows"))
        assert_close(outputs, expected, atol)


@pytest.mark.parametrize("groups", [2, 1])
def test_differential_attention(groups):
    layer = DifferentialAttention(
        2, groups, position=RotaryPosition(), lambda_init=0.3, use_bias=False
    )
    layer.build((None, None, WIDTH))
    randomize(layer)
    x = sample()
    q, k, v = kernels(layer, "query", "key", "value")
    vectors = to_numpy(layer.lambdas)
    products = np.exp((vectors[:, 0] * vectors[:, 1]).sum(-1))
    weight = products[0] - products[1] + 0.3
    scale = to_numpy(layer.head_norm.scale)
    heads = np.zeros((*x.shape[:2], 2, v.shape[-1]))
    mask = np.tri(x.shape[1], dtype=bool)
    for row, head in np.ndindex(len(x), 2):
        group = head // (2 // groups)
        maps = [
            softmax(
                rotate(x[row] @ q[:, 2 * head + i])
                @ rotate(x[row] @ k[:, 2 * group + i]).T
                / np.sqrt(q.shape[-1]),
                mask,
            )
            for i in range(2)
        ]
        found = (maps[0] - weight * maps[1]) @ (x[row] @ v[:, group])
        heads[row, :, head] = rms_norm(found, scale, 1e-5) * (1 - 0.3)
    check(layer, x, np.tensordot(heads, kernels(layer, "output")[0], 2))
    _, scores = layer(x, return_attention_scores=True)
    assert_close(to_numpy(scores)[-1, -1], maps[0] - weight * maps[1])


@pytest.mark.parametrize("query_latent_dim", [None, 5])
@pytest.mark.parametrize("window", [None, 4])
def test_latent_attention(window, query_latent_dim):
    layer = LatentAttention(
        4,
        key_dim=3,
        value_dim=6,
        latent_dim=7,
        rotary_dim=2,
        query_latent_dim=query_latent_dim,
        window=window,
    )
    layer.build((None, None, WIDTH))
    randomize(layer)
    x = sample()
    q, latent, rotary, output = kernels(
        layer, "query", "latent", "rotary_key", "output"
    )
    key_up, value_up = to_numpy(layer.key_up), to_numpy(layer.value_up)
    heads = np.zeros((*x.shape[:2], 4, 6))
    mask = np.tri(x.shape[1], dtype=bool)
    if window:
        mask &= ~np.tri(x.shape[1], k=-window, dtype=bool)
    for row, head in np.ndindex(len(x), 4):
        inner = x[row]
        if query_latent_dim:
            inner = inner @ to_numpy(layer.query_down.kernel)
            inner = rms_norm(inner, to_numpy(layer.query_norm.scale), 1e-6)
        query = inner @ q[:, head]
        small = rms_norm(x[row] @ latent, to_numpy(layer.latent_norm.scale), 1e-6)
        logits = query[:, :3] @ (small @ key_up[head].T).T
        logits = logits + rotate(query[:, 3:]) @ rotate(x[row] @ rotary).T
        heads[row, :, head] = softmax(logits / np.sqrt(5), mask) @ (
            small @ value_up[head]
        )
    check(layer, x, np.tensordot(heads, output, 2))
    cache = layer.create_cache(2, 50)
    assert {k: tuple(v.shape) for k, v in cache.items()} == {
        "latent": (2, 1, window or 50, 7 + 2)
    }


def test_retention():
    """The paper's parallel form, its recurrent form, and ours are one."""
    layer = Retention(2)
    layer.build((None, None, WIDTH))
    randomize(layer)
    # Longer than a chunk of the computation.
    x = sample(batch=2, length=70)
    q, k, v, gate, output = kernels(layer, "query", "key", "value", "gate", "output")
    found = np.zeros((2, 70, 2, 16))
    for row, head in np.ndindex(2, 2):
        narrow, wide = (slice(head * n, head * n + n) for n in (8, 16))
        query, key = rotate(x[row] @ q[:, narrow]), rotate(x[row] @ k[:, narrow])
        key, value = key / np.sqrt(8), x[row] @ v[:, wide]
        gamma = 1 - 2.0 ** (-5 - head)
        distance = np.arange(70)[:, None] - np.arange(70)
        decay = np.where(distance >= 0, gamma ** np.maximum(distance, 0), 0)
        parallel = (query @ key.T * decay) @ value
        state, recurrent = np.zeros((8, 16)), []
        for t in range(70):
            state = gamma * state + np.outer(key[t], value[t])
            recurrent.append(query[t] @ state)
        np.testing.assert_allclose(parallel, recurrent, atol=1e-9)
        found[row, :, head] = rms_norm(parallel, to_numpy(layer.head_norm.scale), 1e-6)
    expected = (found.reshape(2, 70, 32) * silu(x @ gate)) @ output
    assert_close(called(layer)(x), expected, 1e-4)
    outputs, _ = run_chunks(layer, x, [66, 1, 1, 2], ("int", "rows"), capacity=70)
    assert_close(outputs, expected, 1e-4)


# === RWKV-7, against KerasHub's ===


def kerashub_rwkv():
    backbone = keras_hub.models.RWKV7Backbone(
        hidden_size=WIDTH,
        head_size=8,
        num_layers=2,
        vocabulary_size=11,
        intermediate_dim=24,
        gate_lora=6,
        mv_lora=5,
        aaa_lora=4,
        decay_lora=3,
    )
    return randomize(backbone, scale=0.3)


def copy_time_mix(theirs, ours):
    """Copies their weights, by our names."""
    names = {"receptance": "r", "decay": "w", "key": "k", "value": "v", "rate": "a"}
    for name, letter in {**names, "gate": "g"}.items():
        ours.mixes[name].assign(getattr(theirs, f"x_{letter}"))
        if name in ours.narrow:
            for dense, number in zip(ours.narrow[name], (1, 2)):
                dense.kernel.assign(getattr(theirs, f"{letter}{number}"))
        if name in ours.biases:
            ours.biases[name].assign(getattr(theirs, f"{letter}0"))
    ours.unit_scale.assign(theirs.k_k)
    ours.rate_scale.assign(theirs.k_a)
    ours.bonus.assign(theirs.r_k)
    ours.norm_scale.assign(theirs.ln_x.gamma)
    ours.norm_bias.assign(theirs.ln_x.beta)
    pairs = {
        "receptance_dense": theirs.receptance,
        "key_dense": theirs.key,
        "value_dense": theirs.value,
        "output_dense": theirs.output_layer,
    }
    for name, dense in pairs.items():
        getattr(ours, name).kernel.assign(dense.kernel)


@pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package")
def test_rwkv_is_kerashubs():
    theirs = kerashub_rwkv()
    # Longer than a chunk of the computation.
    x = sample(batch=2, length=20)
    sizes = {"decay_dim": 3, "rate_dim": 4, "value_dim": 5, "gate_dim": 6}
    value = None
    for i, block in enumerate(theirs.rwkv_layers):
        ours = RWKVTimeMix(2, value_residual=i > 0, **sizes)
        ours.build(x.shape)
        copy_time_mix(block.att, ours)
        expected, their_value, _ = block.att(ops.convert_to_tensor(x), v_first=value)
        further = {} if value is None else {"first_value": value}
        outputs, values = ours(x, return_value=True, **further)
        assert_close(outputs, expected, 1e-4)
        if value is None:
            assert_close(values, their_value)
            steps, _ = run_chunks(ours, x, [17, 1, 2], ("int", "rows"), capacity=20)
            assert_close(steps, expected, 1e-4)
        value = their_value
        mix = RWKVChannelMix(24)
        mix.build(x.shape)
        mix.mix.assign(block.ffn.x_k)
        mix.key_dense.kernel.assign(block.ffn.key.kernel)
        mix.value_dense.kernel.assign(block.ffn.value.kernel)
        assert_close(mix(x), block.ffn(ops.convert_to_tensor(x)), 1e-4)


def test_first_values_of_rwkv():
    layer = RWKVTimeMix(2, value_residual=True)
    with pytest.raises(ValueError, match="first_value"):
        layer(sample())
    plain = RWKVTimeMix(2)
    with pytest.raises(ValueError, match="first_value"):
        plain(sample(), first_value=sample())
