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
from tests.helpers import LINEAR, LLAMA3, YARN, assert_close, sample, to_numpy

SCALINGS = [
    None,
    LINEAR,
    LLAMA3,
    {**LLAMA3, "original_max_position_embeddings": 8192},
    YARN,
    {**YARN, "original_max_position_embeddings": 2048, "factor": 16.0},
    {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
    {**YARN, "factor": 0.5},
]


# ---- The formulas, number by number ----


def paper_frequencies(dim, base, scaling):
    """The angle per position of each pair, and the factor of sines and cosines."""
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    if scaling is None:
        return plain, 1.0
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    context = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        stretched = []
        for f in plain:
            wavelength = 2 * math.pi / f
            if wavelength < context / high:
                stretched.append(f)
            elif wavelength > context / low:
                stretched.append(f / factor)
            else:
                s = (context / wavelength - low) / (high - low)
                stretched.append((1 - s) * f / factor + s * f)
        return stretched, 1.0

    def dimension_of(rotations):
        inside = context / (rotations * 2 * math.pi)
        return dim * math.log(inside) / (2 * math.log(base))

    first = dimension_of(scaling.get("beta_fast", 32))
    last = dimension_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    stretched = []
    for i, f in enumerate(plain):
        interpolated = min(max((i - first) / (last - first), 0), 1)
        stretched.append(f / factor * interpolated + f * (1 - interpolated))

    def magnitude(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in scaling:
        return stretched, scaling["attention_factor"]
    if "mscale" in scaling:
        above, below = scaling["mscale"], scaling["mscale_all_dim"]
        return stretched, magnitude(above) / magnitude(below)
    return stretched, magnitude(1.0)


def paper_rotation(x, positions, frequencies, magnitude):
    """Rotates each pair `(i, i + dim / 2)` as a complex number."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angles = np.multiply.outer(positions, np.array(frequencies))[..., None, :]
    turned = pairs * np.exp(1j * angles) * magnitude
    return np.concatenate([turned.real, turned.imag], axis=-1)


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


def paper_slopes(heads):
    """ALiBi's slopes, also for numbers of heads that are no power of two."""
    if math.log2(heads).is_integer():
        start = 2 ** (-8 / heads)
        return [start ** (i + 1) for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return paper_slopes(closest) + paper_slopes(2 * closest)[::2][: heads - closest]


# ---- Rotary ----


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dim, base", [(8, 10_000), (64, 500_000.0)])
def test_rotary_frequencies_of_the_papers(scaling, dim, base):
    frequencies, magnitude = rotary_frequencies(dim, base, scaling)
    expected, factor = paper_frequencies(dim, base, scaling)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    assert magnitude == pytest.approx(factor)


def test_scalings_change_something_at_the_sizes_tested():
    plain, _ = rotary_frequencies(64, 10_000)
    for scaling in SCALINGS[1:]:
        scaled, _ = rotary_frequencies(64, 10_000, scaling)
        assert np.abs(scaled / plain - 1).max() > 0.1
    old_name = {"type": "linear", "factor": 4.0}
    assert_close(*(rotary_frequencies(8, 100, x)[0] for x in (old_name, LINEAR)))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotation(scaling):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(3, 5, 4, 8)).astype("float32")
    key = rng.normal(size=(3, 5, 2, 8)).astype("float32")
    frequencies = paper_frequencies(8, 10_000, scaling)
    scheme = RotaryPosition(scaling=scaling)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [900, 1, 2, 3, 4]])
    for shown in (positions[1], positions):
        rotated = scheme.encode(
            query,
            key,
            ops.convert_to_tensor(shown, "int32"),
            ops.convert_to_tensor(shown, "int32"),
        )
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


@pytest.mark.parametrize("scaling", [s for s in SCALINGS if s])
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


def scheme_of(num_buckets, max_distance, bidirectional, num_heads=4):
    scheme = RelativePositionBias(num_buckets, max_distance, bidirectional)
    scheme.build(num_heads)
    return scheme


@pytest.mark.parametrize("settings", BUCKETS)
def test_buckets_of_the_paper(settings):
    # One size for all, and far enough for the largest `max_distance`.
    relative = np.arange(-1500, 1500, dtype="int32")
    buckets = to_numpy(scheme_of(*settings).bucket(ops.convert_to_tensor(relative)))
    expected = [paper_bucket(int(r), *settings) for r in relative]
    np.testing.assert_array_equal(buckets, expected)


def t5_attention(causal, num_buckets=8, max_distance=10):
    """Transformers' layer and ours, with the same weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5 import modeling_t5

    config = transformers.T5Config(
        d_model=16,
        d_kv=6,
        num_heads=4,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
        is_decoder=causal,
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    reference = modeling_t5.T5Attention(
        config, has_relative_attention_bias=True, layer_idx=0
    ).eval()
    ours = T5Attention(4, 6, num_buckets, max_distance, causal=causal)
    ours.build((None, None, 16))
    with torch.no_grad():
        for weight in reference.parameters():
            weight.normal_(std=0.4)
    weights = {k: v.detach().numpy() for k, v in reference.named_parameters()}
    ours.query_dense.kernel.assign(weights["q.weight"].T.reshape(16, 4, 6))
    ours.key_dense.kernel.assign(weights["k.weight"].T.reshape(16, 4, 6))
    ours.value_dense.kernel.assign(weights["v.weight"].T.reshape(16, 4, 6))
    ours.output_dense.kernel.assign(weights["o.weight"].T.reshape(4, 6, 16))
    ours.position.embeddings.assign(weights["relative_attention_bias.weight"])
    assert len(weights) == len(ours.weights) == 5
    return torch, reference, ours


@pytest.mark.parametrize("settings", BUCKETS)
def test_buckets_of_transformers(settings):
    num_buckets, max_distance, bidirectional = settings
    torch, reference, _ = t5_attention(not bidirectional, num_buckets, max_distance)
    numbers = torch.arange(num_buckets, dtype=torch.float32)[:, None].expand(-1, 4)
    # A bias that is the number of its bucket.
    reference.relative_attention_bias.weight.data.copy_(numbers)
    length = 2 * min(max_distance, 200)
    with torch.no_grad():
        theirs = reference.compute_bias(length, length).numpy()[0, 0]
    positions = np.arange(length, dtype="int32")
    relative = ops.convert_to_tensor(positions[None] - positions[:, None])
    np.testing.assert_array_equal(
        to_numpy(scheme_of(*settings).bucket(relative)), theirs
    )


@pytest.mark.parametrize("causal", [True, False])
def test_bias_of_transformers(causal):
    torch, reference, ours = t5_attention(causal)
    with torch.no_grad():
        expected = reference.compute_bias(12, 15).numpy()[0]
    bias = ours.position.bias(
        ops.arange(12, dtype="int32"), ops.arange(15, dtype="int32")
    )
    assert_close(bias, expected, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_attention_of_transformers(causal):
    torch, reference, ours = t5_attention(causal)
    x = sample()
    mask = None
    if causal:
        visible = torch.ones(12, 12, dtype=torch.bool).tril()
        mask = torch.zeros(12, 12).masked_fill(~visible, -1e30)[None, None]
    with torch.no_grad():
        expected = reference(torch.tensor(x), mask=mask)[0].numpy()
    assert_close(ours(x), expected, atol=5e-5)
    if causal:
        cache = ours.create_cache(3, 12)
        head, cache = ours(x[:, :8], cache=cache, cache_update_index=0)
        tail, cache = ours(x[:, 8:], cache=cache, cache_update_index=8)
        joined = np.concatenate([to_numpy(head), to_numpy(tail)], axis=1)
        assert_close(joined, expected, atol=5e-5)


# ---- ALiBi ----


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


@pytest.mark.parametrize("heads", [4, 6])
def test_alibi_of_bloom(heads):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 12), heads, torch.float32)
    theirs = np.broadcast_to(theirs.numpy().reshape(heads, 1, 12), (heads, 12, 12))
    scheme = AlibiBias()
    scheme.build(heads)
    positions = ops.arange(12, dtype="int32")
    ours = to_numpy(scheme.bias(positions, positions))
    # Theirs grows with the key's position, ours falls with the distance: the
    # same for softmax, which ignores what is added to all keys of a query.
    causal = np.tri(12, dtype=bool)
    shift = np.where(causal, theirs - ours, 0)[:, :, :1]
    assert_close(np.where(causal, theirs - ours - shift, 0), 0 * ours, atol=1e-5)
