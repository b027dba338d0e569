"""Every cached layer of the library keeps the contract: one line for each.

A new variant is covered by a new line. What only attention layers have in common
(masks, scores, rewinding) is in `test_attention_calls.py`.
"""

import keras
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from attention import (
    AlibiBias,
    DifferentialAttention,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    Mamba2,
    MultiHeadAttention,
    MultiQueryAttention,
    PositionEmbedding,
    QuantizedCache,
    RelativePositionBias,
    Retention,
    RingCache,
    RotaryAttention,
    RotaryPosition,
    RWKVChannelMix,
    RWKVTimeMix,
    ShortConvolution,
    SinusoidalPositions,
    T5Attention,
)
from attention.testing import check_cached_layer, check_cached_model
from attention.testing.checking import CHECKS
from blocks import CustomDecoder
from tests.helpers import (
    YARN,
    EmbedAndAttendTwice,
    ProducerAndReader,
    load_example,
    slow,
)
from tests.models import make_variant

own = load_example("own_attention")

LAYERS = {
    "multi_head": lambda: MultiHeadAttention(4),
    "multi_query": lambda: MultiQueryAttention(4),
    "grouped": lambda: GroupedQueryAttention(4, 2, use_bias=False, dropout=0.1),
    "value_dim": lambda: MultiHeadAttention(4, key_dim=3, value_dim=6, scale=0.3),
    "rotary": lambda: RotaryAttention(4, 2, max_wavelength=50),
    # The other scalings differ in the numbers of a table (`test_position_schemes`).
    "rotary_yarn": lambda: RotaryAttention(4, 2, scaling=YARN),
    "t5": lambda: T5Attention(4, num_buckets=8, max_distance=10),
    "t5_grouped": lambda: GroupedQueryAttention(
        4, 2, position=RelativePositionBias(8, 10)
    ),
    "alibi": lambda: GroupedQueryAttention(6, 3, key_dim=4, position=AlibiBias()),
    "window": lambda: RotaryAttention(4, 2, window=5),
    "window_of_one": lambda: T5Attention(4, num_buckets=8, max_distance=10, window=1),
    "options": lambda: GroupedQueryAttention(
        4,
        2,
        value_dim=6,
        window=7,
        position=RotaryPosition(rotary_dim=2),
        query_key_norm=True,
        logit_soft_cap=5.0,
        attention_sinks=True,
        output_gate=True,
    ),
    "int8": lambda: RotaryAttention(4, 2, cache_dtype="int8"),
    "first_tokens_stay": lambda: RotaryAttention(4, 2, cache_policy=RingCache(3, 2)),
    "int8_window": lambda: LatentAttention(
        2, cache_policy=QuantizedCache(RingCache(4, keep=1))
    ),
    "own_cache_policy": lambda: RotaryAttention(
        4, 2, cache_policy=own.ThinningCache(3)
    ),
    "talking_heads": lambda: own.TalkingHeadsAttention(4, 2),
    "gated_values": lambda: own.GatedValueAttention(4, 2),
    "top_k": lambda: own.TopKAttention(4, k=3),
    "differential": lambda: DifferentialAttention(2, position=RotaryPosition()),
    "latent": lambda: LatentAttention(4, latent_dim=6, rotary_dim=2),
    "latent_window": lambda: LatentAttention(2, query_latent_dim=5, window=4),
    "retention": lambda: Retention(2),
    "gated_delta_net": lambda: GatedDeltaNet(4, 2),
    "mamba2": lambda: Mamba2(4, state_dim=6, num_groups=2),
    "rwkv_time_mix": lambda: RWKVTimeMix(2),
    "rwkv_channel_mix": lambda: RWKVChannelMix(24),
    "short_convolution": lambda: ShortConvolution(3, use_bias=True),
    "sinusoidal_positions": lambda: SinusoidalPositions(100.0),
    "position_embedding": lambda: PositionEmbedding(12, "random_normal"),
    "shared_key_value": ProducerAndReader,
    "composite": EmbedAndAttendTwice,
    "decoder": lambda: CustomDecoder(32, 4, dropout=0.1),
    "decoder_options": lambda: CustomDecoder(
        32,
        4,
        2,
        activation="relu",
        layer_norm_epsilon=1e-3,
        normalize_first=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.2),
        bias_initializer="ones",
    ),
}
# Backbones of other topologies: `test_topologies.py`.
BACKBONES = ["t5"]


# Rounding has no gradient, and is no small error.
ROUNDED = {"int8": 0.05, "int8_window": 0.05}


# One of each kind. On torch, where nothing is compiled, `.ci/run` has them all.
EVERYWHERE = ["options", "gated_delta_net"]
EVERYWHERE += ["rwkv_channel_mix", "short_convolution", "position_embedding"]


@pytest.mark.parametrize("name", [x if x in EVERYWHERE else slow(x) for x in LAYERS])
def test_layers(name):
    tolerance = ROUNDED.get(name)
    checks = [x for x in CHECKS if tolerance is None or x != "gradients"]
    if name == "top_k":
        checks.remove("low_precision")  # rounding decides between two like keys
    if keras.config.backend() == "torch":
        checks.remove("compiled")
    if keras.config.backend() == "jax" and name not in ("options", "top_k"):
        checks.remove("low_precision")  # compiles all for each of three policies
    report = check_cached_layer(
        LAYERS[name], max_length=9, checks=checks, tolerance=tolerance
    )
    assert list(report) == checks


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.slow
def test_backbones(name):
    report = check_cached_model(lambda: make_variant(name, num_layers=1), max_length=9)
    assert "padding" in report


SCHEMES = {
    "none": lambda: None,
    "rotary": RotaryPosition,
    "t5": lambda: RelativePositionBias(6, 7),
    "alibi": AlibiBias,
}
EQUALITIES = ["rows", "causality", "prefill_and_steps", "chunks", "positions"]
EQUALITIES += ["masked_rows", "padding", "capacity", "rewind", "packing"]


@settings(
    # JAX compiles for each shape, operation by operation.
    max_examples=2 if keras.config.backend() == "jax" else 3,
    deadline=None,
    derandomize=True,
    # A failing example is not made smaller: each try takes seconds.
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    key_dim=st.sampled_from([2, 4, 6]),
    value_dim=st.sampled_from([None, 3, 5]),
    position=st.sampled_from(sorted(SCHEMES)),
    hidden_dim=st.integers(1, 9),
    batch_size=st.integers(2, 5),
    max_length=st.integers(8, 20),
    seed=st.integers(0, 2**16),
)
@pytest.mark.slow
def test_any_shape(
    groups, per_group, key_dim, value_dim, position, hidden_dim, **sizes
):
    """Random heads, widths, lengths, batch sizes, and with the seed chunk sizes."""
    report = check_cached_layer(
        lambda: GroupedQueryAttention(
            groups * per_group,
            groups,
            key_dim=key_dim,
            value_dim=value_dim,
            position=SCHEMES[position](),
        ),
        hidden_dim=hidden_dim,
        checks=EQUALITIES,
        **sizes,
    )
    assert max(report.values()) < 1e-4
