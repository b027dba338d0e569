"""Position schemes against their papers' formulas, transformers and KerasHub."""

import math

import keras_hub
import numpy as np
import pytest
from keras import ops

from attention import (
    AlibiBias,
    RelativePositionBias,
    RotaryPosition,
    T5Attention,
)
from attention.positions.rotary_scaling import rotary_frequencies
from tests.helpers import (
    LINEAR,
    LLAMA3,
    YARN,
    assert_close,
    band,
    built,
    check_outputs,
    sample,
    to_numpy,
)
from tests.torch_modules import kernel, numbers, randomized, run

SCALINGS = [
    LINEAR,
    LLAMA3,
    {**LLAMA3, "original_max_position_embeddings": 8192},
    YARN,
    {**YARN, "original_max_position_embeddings": 2048, "factor": 16.0},
    {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
    {**YARN, "factor": 0.5},
]


# ---- Rotary ----


def paper_rotation(x, positions, frequencies, magnitude):
    """Rotates each pair `(i, i + dim / 2)` as a complex number."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angles = np.multiply.outer(positions, np.array(frequencies))[..., None, :]
    turned = pairs * np.exp(1j * angles) * magnitude
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_scalings_change_something_at_the_sizes_tested():
    plain, _ = rotary_frequencies(64, 10_000)
    for scaling in SCALINGS:
        scaled, _ = rotary_frequencies(64, 10_000, scaling)
        assert np.abs(scaled / plain - 1).max() > 0.1
    old_name = {"type": "linear", "factor": 4.0}
    assert_close(*(rotary_frequencies(8, 100, x)[0] for x in (old_name, LINEAR)))


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN])
def test_rotation(scaling):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(3, 5, 4, 8)).astype("float32")
    key = rng.normal(size=(3, 5, 2, 8)).astype("float32")
    frequencies = rotary_frequencies(8, 10_000, scaling)
    scheme = RotaryPosition(scaling=scaling)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [900, 1, 2, 3, 4]])
    for shown in (positions[1], positions):
        tensor = ops.convert_to_tensor(shown, "int32")
        rotated = scheme.encode(query, key, tensor, tensor)
        for have, x in zip(rotated, (query, key)):
            assert_close(have, paper_rotation(x, shown, *frequencies), atol=2e-4)
    assert scheme.bias(shown, shown) is None


def test_rotary_embedding_of_keras_hub():
    x = sample(length=10, width=16).reshape(3, 10, 2, 8)
    positions = ops.arange(10, dtype="int32")
    rotated, _ = RotaryPosition(max_wavelength=500).encode(x, x, positions, positions)
    reference = keras_hub.layers.RotaryEmbedding(max_wavelength=500)
    assert_close(rotated, reference(x))
    rotated, _ = RotaryPosition(scaling=LINEAR).encode(x, x, positions, positions)
    reference = keras_hub.layers.RotaryEmbedding(scaling_factor=4.0)
    assert_close(rotated, reference(x))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dim, base", [(8, 10_000), (64, 500_000.0)])
def test_rotary_frequencies_of_transformers(scaling, dim, base):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=dim * 2,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=131_072,
        rope_parameters={**scaling, "rope_theta": base},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    frequencies, magnitude = rotary_frequencies(dim, base, scaling)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=2e-6)
    assert magnitude == pytest.approx(factor)


# ---- T5 ----

BUCKETS = [
    (32, 128, False),
    (32, 128, True),
    (8, 10, False),
    (8, 10, True),
    (7, 50, False),
    (2, 3, False),
    (4, 20, True),
    (64, 1000, True),
]


def paper_bucket(relative, buckets, farthest, bidirectional):
    """T5's bucket of one `key position - query position`."""
    bucket = 0
    distance = -relative
    if bidirectional:
        buckets //= 2
        bucket = buckets if relative > 0 else 0
        distance = abs(relative)
    distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    # The small number undoes the rounding of logarithms that are whole numbers.
    steps = math.log(distance / exact) / math.log(farthest / exact) + 1e-9
    return bucket + min(exact + int(steps * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize("settings", BUCKETS)
def test_buckets_of_the_paper(settings):
    # One size for all, and far enough for the largest `max_distance`.
    relative = np.arange(-1500, 1500, dtype="int32")
    scheme = RelativePositionBias(*settings)
    scheme.build(4)
    buckets = to_numpy(scheme.bucket(ops.convert_to_tensor(relative)))
    expected = [paper_bucket(int(r), *settings) for r in relative]
    np.testing.assert_array_equal(buckets, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_attention_of_transformers(causal):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5 import modeling_t5

    config = transformers.T5Config(
        d_model=16,
        d_kv=6,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        is_decoder=causal,
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    theirs = randomized(
        modeling_t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    )
    ours = built(T5Attention(4, 6, num_buckets=8, max_distance=10, causal=causal))
    for part in "qkvo":
        name = {"q": "query", "k": "key", "v": "value", "o": "output"}[part]
        weight = getattr(ours, f"{name}_dense").kernel
        weight.assign(kernel(getattr(theirs, part)).reshape(weight.shape))
    ours.position.embeddings.assign(numbers(theirs.relative_attention_bias.weight))
    assert len(ours.weights) == 5
    mask = np.where(band(12, causal=causal), 0, -1e30)[None, None].astype("float32")
    expected, *_ = run(theirs, sample(), mask=torch.from_numpy(mask))
    plans = [[8, 4]] if causal else []
    check_outputs(ours, sample(), expected, *plans, atol=5e-5)


# ---- ALiBi ----


def paper_slopes(heads):
    """ALiBi's slopes, also for numbers of heads that are no power of two."""
    if math.log2(heads).is_integer():
        start = 2 ** (-8 / heads)
        return [start ** (i + 1) for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return paper_slopes(closest) + paper_slopes(2 * closest)[::2][: heads - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 20, 112])
def test_slopes_of_the_paper(heads):
    scheme = AlibiBias()
    scheme.build(heads)
    np.testing.assert_allclose(scheme.slopes, paper_slopes(heads), rtol=1e-6)


def test_bias_of_the_paper():
    scheme = AlibiBias()
    scheme.build(6)
    queries, keys = np.array([[3, 4], [9, 10]], "int32"), np.arange(11, dtype="int32")
    expected = np.zeros((2, 6, 2, 11))
    for row, head, i, j in np.ndindex(*expected.shape):
        distance = abs(int(queries[row, i]) - int(keys[j]))
        expected[row, head, i, j] = -paper_slopes(6)[head] * distance
    bias = scheme.bias(ops.convert_to_tensor(queries), ops.convert_to_tensor(keys))
    assert_close(bias, expected, atol=1e-6)
    # The bias of one row at one position, without a batch axis.
    bias = scheme.bias(ops.convert_to_tensor(queries[0]), ops.convert_to_tensor(keys))
    assert_close(bias, expected[0], atol=1e-6)
