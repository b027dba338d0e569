"""Mixers against their papers' formulas, KerasHub's RWKV-7 and transformers."""

import keras_hub
import numpy as np
import pytest
from keras import ops

from attention import (
    GatedDeltaNet,
    Mamba2,
    Retention,
    RWKVChannelMix,
    RWKVTimeMix,
    ShortConvolution,
)
from tests.helpers import (
    WIDTH,
    assert_close,
    built,
    check_outputs,
    randomize,
    rms_norm,
    rotate,
    sample,
    to_numpy,
)
from tests.torch_modules import kernel, numbers, randomized, run


def kernels(layer, *parts):
    return [to_numpy(getattr(layer, f"{p}_dense").kernel).astype("f8") for p in parts]


def silu(x):
    return x / (1 + np.exp(-x))


# What is read from the states exceeds what float16 holds, in the second case.
@pytest.mark.parametrize("dtype, scale", [("float32", 1), ("float16", 100)])
def test_retention(dtype, scale):
    """The paper's parallel form."""
    layer = built(Retention(2, dtype=dtype))
    # Longer than a chunk of the computation.
    x = scale * sample(batch=2, length=70)
    x = to_numpy(ops.cast(x, dtype)).astype("float32")
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
        found[row, :, head] = rms_norm(parallel, to_numpy(layer.head_norm.scale), 1e-6)
    expected = (found.reshape(2, 70, 32) * silu(x @ gate)) @ output
    atol = 1e-4 if dtype == "float32" else 2e-2 * np.abs(expected).max()
    check_outputs(layer, x, expected, [66, 1, 1, 2], atol=atol)


@pytest.mark.parametrize("dtype, digits", [("float16", 11), ("bfloat16", 8)])
def test_a_short_convolution_rounds_once(dtype, digits):
    layer = built(ShortConvolution(4, dtype=dtype))
    x = ops.cast(sample(length=9), dtype)
    kernel, known = (to_numpy(ops.cast(y, "float32")) for y in (layer.kernel, x))
    past = np.pad(known, [(0, 0), (3, 0), (0, 0)])
    expected = sum(past[:, i : i + 9] * kernel[i] for i in range(4))
    outputs = to_numpy(ops.cast(layer(x), "float32"))
    np.testing.assert_allclose(outputs, expected, rtol=1.01 * 2.0**-digits, atol=1e-6)


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
@pytest.mark.slow
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
            check_outputs(ours, x, expected, [17, 1, 2], atol=1e-4)
        value = their_value
        mix = RWKVChannelMix(24)
        mix.build(x.shape)
        mix.mix.assign(block.ffn.x_k)
        mix.key_dense.kernel.assign(block.ffn.key.kernel)
        mix.value_dense.kernel.assign(block.ffn.value.kernel)
        assert_close(mix(x), block.ffn(ops.convert_to_tensor(x)), 1e-4)


def test_first_values_of_rwkv():
    with pytest.raises(ValueError, match="first_value"):
        RWKVTimeMix(2, value_residual=True)(sample())
    with pytest.raises(ValueError, match="first_value"):
        RWKVTimeMix(2)(sample(), first_value=sample())


# === Transformers' ===


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        num_heads=4,
        head_dim=8,
        hidden_size=WIDTH,
        state_size=6,
        n_groups=groups,
        expand=2,
        num_hidden_layers=1,
        chunk_size=16,
    )
    theirs = randomized(Mamba2Mixer(config, 0))
    layer = built(Mamba2(4, state_dim=6, num_groups=groups))
    layer.input_dense.kernel.assign(kernel(theirs.in_proj))
    layer.output_dense.kernel.assign(kernel(theirs.out_proj))
    layer.convolution.kernel.assign(numbers(theirs.conv1d.weight)[:, 0].T)
    pairs = [
        (layer.convolution.bias, theirs.conv1d.bias),
        (layer.log_rate, theirs.A_log),
        (layer.step_bias, theirs.dt_bias),
        (layer.skip, theirs.D),
        (layer.norm_scale, theirs.norm.weight),
    ]
    for ours, value in pairs:
        ours.assign(numbers(value))
    x = sample(batch=2, length=70)
    check_outputs(layer, x, run(theirs, x), [66, 1, 1, 2], atol=1e-4)


@pytest.mark.parametrize("key_heads", [2, 4])
def test_gated_delta_net(key_heads):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        Qwen3NextGatedDeltaNet,
    )

    config = transformers.Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        linear_num_value_heads=4,
        linear_num_key_heads=key_heads,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        linear_conv_kernel_dim=4,
        layer_types=["linear_attention"],
    )
    theirs = randomized(Qwen3NextGatedDeltaNet(config, 0))
    layer = built(GatedDeltaNet(4, key_heads, key_dim=3, value_dim=5))
    # Theirs are ordered by key heads: query, key, values and gates of each.
    per_head = 4 // key_heads
    mixed = kernel(theirs.in_proj_qkvz).reshape(WIDTH, key_heads, -1)
    cuts = np.cumsum([3, 3, 5 * per_head])
    parts = [x.reshape(WIDTH, -1) for x in np.split(mixed, cuts, axis=-1)]
    layer.query_key_value.kernel.assign(np.concatenate(parts[:3], axis=-1))
    layer.gate_dense.kernel.assign(parts[3])
    small = kernel(theirs.in_proj_ba).reshape(WIDTH, key_heads, 2, per_head)
    layer.beta_dense.kernel.assign(small[:, :, 0].reshape(WIDTH, 4))
    layer.decay_dense.kernel.assign(small[:, :, 1].reshape(WIDTH, 4))
    layer.convolution.kernel.assign(numbers(theirs.conv1d.weight)[:, 0].T)
    layer.log_rate.assign(numbers(theirs.A_log))
    layer.decay_bias.assign(numbers(theirs.dt_bias))
    layer.head_norm.scale.assign(numbers(theirs.norm.weight))
    layer.output_dense.kernel.assign(kernel(theirs.out_proj))
    x = sample(batch=2, length=70)
    check_outputs(layer, x, run(theirs, x), [66, 1, 1, 2], atol=1e-4)
