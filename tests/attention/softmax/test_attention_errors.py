"""Bad input: each error names the argument, what was received, and what to do."""

import keras
import numpy as np
import pytest

from attention import (
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    Mamba2,
    MultiHeadAttention,
    MultiQueryAttention,
    PositionEmbedding,
    RelativePositionBias,
    Retention,
    RotaryAttention,
    RotaryPosition,
    RWKVChannelMix,
    RWKVTimeMix,
    ShortConvolution,
    T5Attention,
    TokenShift,
    create_cache,
    grow_cache,
)
from tests.helpers import (
    BATCH,
    LENGTH,
    LLAMA3,
    WIDTH,
    YARN,
    assert_close,
    make,
    ragged,
    raises,
    sample,
    secret,
)

pytestmark = pytest.mark.same_everywhere


@pytest.fixture(scope="module")
def layer():
    return make("grouped")


@pytest.fixture(scope="module")
def cache(layer):
    return layer.create_cache(BATCH, LENGTH)


@pytest.mark.parametrize(
    "create, kind, parts",
    [
        (lambda: GroupedQueryAttention(4, 3), ValueError, ["num_heads=4", "divisible"]),
        (lambda: GroupedQueryAttention(2, 4), ValueError, ["num_key_value_heads=4"]),
        (lambda: RotaryAttention(4, 0), ValueError, ["num_key_value_heads=0"]),
        (lambda: MultiHeadAttention(0), ValueError, ["num_heads=0", "positive"]),
        (lambda: MultiQueryAttention(2.0), TypeError, ["num_heads=2.0", "integer"]),
        (lambda: MultiHeadAttention(True), TypeError, ["num_heads=True"]),
        (lambda: MultiHeadAttention(2, key_dim=0), ValueError, ["key_dim=0"]),
        (lambda: MultiHeadAttention(2, value_dim=-1), ValueError, ["value_dim=-1"]),
        (lambda: MultiHeadAttention(2, dropout=1.0), ValueError, ["dropout=1.0"]),
        (lambda: MultiHeadAttention(2, dropout="x"), ValueError, ["dropout='x'"]),
        (lambda: MultiHeadAttention(2, scale="x"), TypeError, ["scale='x'"]),
        (lambda: MultiHeadAttention(2, logit_soft_cap=0), ValueError, ["soft_cap=0"]),
        (lambda: MultiHeadAttention(2, logit_soft_cap="x"), TypeError, ["cap='x'"]),
        (lambda: MultiHeadAttention(2, window=0), ValueError, ["window=0"]),
        (lambda: MultiHeadAttention(2, window=-1), ValueError, ["window=-1"]),
        (lambda: MultiHeadAttention(2, window=2.0), TypeError, ["window=2.0"]),
        (lambda: MultiHeadAttention(2, position="x"), TypeError, ["position='x'"]),
        (lambda: PositionEmbedding(0), ValueError, ["sequence_length=0"]),
        (lambda: RotaryPosition(0), ValueError, ["max_wavelength=0", "positive"]),
        (lambda: RotaryPosition(float("nan")), ValueError, ["max_wavelength=nan"]),
        (lambda: RotaryPosition(scaling="linear"), TypeError, ["scaling='linear'"]),
        (lambda: RotaryPosition(rotary_dim=3), ValueError, ["must be even", "3"]),
        (lambda: RelativePositionBias(1), ValueError, ["num_buckets=1", "128"]),
        (lambda: T5Attention(2, None, 32, 16), ValueError, ["max_distance=16"]),
    ],
)
def test_arguments_of_constructors(create, kind, parts):
    with raises(kind, *parts):
        create()


def test_arguments_of_constructors_that_do_not_go_together():
    with raises(TypeError, "`position` must be", "RotaryPosition"):
        MultiHeadAttention(2, position=RotaryPosition)
    with raises(ValueError, "num_buckets=2", "bidirectional=True"):
        RelativePositionBias(2, bidirectional=True)
    with raises(TypeError, "takes no", "num_key_value_heads=2"):
        LatentAttention(4, num_key_value_heads=2)
    with raises(TypeError, "takes no", "query_key_norm=True"):
        LatentAttention(4, query_key_norm=True)
    with raises(TypeError, "`RWKVTimeMix` takes no", "key_dim=4"):
        RWKVTimeMix(4, key_dim=4)
    with raises(TypeError, "takes no", "key_dim=4", "`state_dim`"):
        Mamba2(4, key_dim=4)


@pytest.mark.parametrize(
    "scaling, parts",
    [
        ({}, ["rope_type", "linear"]),
        ({"rope_type": "dynamic", "factor": 2}, ["'dynamic'", "'yarn'"]),
        ({"rope_type": "linear"}, ["['factor']", "'linear'"]),
        ({"rope_type": "linear", "factor": 0}, ["positive", "['factor']"]),
        ({**LLAMA3, "low_freq_factor": None}, ["['low_freq_factor']", "'llama3'"]),
        ({**LLAMA3, "low_freq_factor": 4.0}, ["high_freq_factor", "larger"]),
        ({**YARN, "beta_fast": "32"}, ["['beta_fast']", "'yarn'"]),
    ],
)
def test_scalings_that_lack_something(scaling, parts):
    with raises(ValueError, *parts):
        RotaryAttention(2, scaling=scaling)


def test_width_that_heads_do_not_divide():
    with raises(ValueError, "num_heads=3", str(WIDTH), "Pass `key_dim`"):
        MultiHeadAttention(3)(sample())
    with raises(ValueError, "must be even", "key_dim=5"):
        RotaryAttention(2, key_dim=5)(sample())
    with raises(ValueError, "rotary_dim", "6", "4"):
        RotaryAttention(4, rotary_dim=6)(sample())


@pytest.mark.parametrize(
    "layer",
    [
        MultiHeadAttention(2),
        Retention(4, key_dim=4),
        GatedDeltaNet(4, key_dim=4),
        RWKVTimeMix(4),
        RWKVChannelMix(32),
        Mamba2(4),
        ShortConvolution(),
        TokenShift(),
        LatentAttention(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_inputs_of_another_rank(layer):
    with raises(ValueError, "(batch, length, width)", "(5, 16)", layer.name):
        layer(secret(5, 16))


def test_token_ids_are_no_embeddings():
    with raises(ValueError, "(batch, length, width)", "not the token ids"):
        PositionEmbedding(8)(np.zeros((3, 5), "int32"))


def test_arguments_of_calls_that_do_not_go_together(layer, cache):
    x, composite = secret(BATCH, 4, WIDTH), make("composite")
    given = {"cache": cache, "cache_update_index": 0}
    with raises(ValueError, "without `cache`", "create_cache", "cache_update_index=3"):
        layer(x, cache_update_index=3)
    with raises(ValueError, "without `cache_update_index`", "Pass the number"):
        layer(x, cache=cache)
    with raises(ValueError, "without `cache_update_index`"):
        PositionEmbedding(8)(x, cache=())
    with raises(ValueError, "cache_update_index=None"):
        composite(x, cache=composite.create_cache(BATCH, LENGTH))
    with raises(TypeError, "`cache`", "keyword"):
        layer(x, None, None, None, None, cache, 0)
    with raises(ValueError, "batch_size=3", "2 rows", "batch_size=2"):
        layer(x[:2], **given)
    with raises(ValueError, "`value` or `key`", "`query` alone"):
        layer(x, value=x[:, ::-1], **given)
    with raises(ValueError, "as many keys as values", "(3, 3, 16)"):
        layer(x, value=x, key=x[:, :3])
    with raises(TypeError, "`attention_mask` must be boolean", "mask == 0"):
        layer(x, attention_mask=secret(BATCH, 4, 4))
    with raises(ValueError, "segment_ids", "cache"):
        layer(x, segment_ids=np.zeros((BATCH, 4), "int32"), **given)


@pytest.mark.parametrize(
    "other",
    [
        lambda: make("multi_query").create_cache(BATCH, LENGTH),
        lambda: make("composite").create_cache(BATCH, LENGTH),
        lambda: (),
        lambda: secret(BATCH, 2, LENGTH, 4),
        lambda: {"key": secret(BATCH, 2, LENGTH, 4)},
        lambda: {
            k: secret(BATCH, 2, LENGTH, 4, dtype="float16") for k in ("key", "value")
        },
        lambda: {"key": 1.0, "value": 2.0},
        lambda: {"key": np.array(["a"]), "value": np.array(["a"])},
    ],
)
def test_a_cache_of_another_layer(layer, other):
    with raises(ValueError, "`cache` was not made by layer 'grouped", "create_cache"):
        layer(secret(BATCH, 4, WIDTH), cache=other(), cache_update_index=0)


@pytest.mark.parametrize(
    "index, kind, parts",
    [
        (-1, ValueError, ["cache_update_index", "negative", "-1"]),
        (np.int64(-2), ValueError, ["negative", "-2"]),
        (np.array([0, -1, 0]), ValueError, ["negative", "(3,)"]),
        (1.0, TypeError, ["cache_update_index=1.0", "integer"]),
        (True, TypeError, ["cache_update_index=True", "integer"]),
        ("0", TypeError, ["cache_update_index='0'", "integer"]),
        (np.float32(1), TypeError, ["integer"]),
        (secret(BATCH), TypeError, ["integer dtype", "float32 tensor of shape (3,)"]),
        (np.array(["a"] * 3), TypeError, ["integer dtype"]),
        (np.zeros(2, "int32"), ValueError, ["3 rows", "(2,)"]),
        (np.zeros((3, 1), "int32"), ValueError, ["3 rows", "(3, 1)"]),
        ([0, 1], ValueError, ["3 rows", "(2,)"]),
        (object(), TypeError, ["integer", "an instance of object"]),
    ],
)
def test_wrong_indices(layer, cache, index, kind, parts):
    with raises(kind, "`cache_update_index`", *parts):
        layer(secret(BATCH, 1, WIDTH), cache=cache, cache_update_index=index)


@pytest.mark.parametrize("index", [0, np.int32(0), np.zeros(3, "uint8"), [0, 0, 0]])
def test_indices_of_all_integer_kinds(layer, cache, index):
    layer(sample(length=1), cache=cache, cache_update_index=index)


def test_more_tokens_than_the_cache_has_room_for(layer, cache):
    with raises(ValueError, "cache_update_index=9", "12 positions", "`max_length`"):
        layer(secret(BATCH, 4, WIDTH), cache=cache, cache_update_index=9)
    with raises(ValueError, "13 tokens", "12 positions", "`grow_cache`"):
        layer(secret(BATCH, 13, WIDTH), cache=cache, cache_update_index=[0, 0, 0])
    with raises(ValueError, "cache_update_index=12", "12 positions"):
        layer(secret(BATCH, 1, WIDTH), cache=cache, cache_update_index=12)


def test_caches_that_can_not_be_created(layer):
    with raises(ValueError, "`causal=False`", "without a cache"):
        bidirectional = MultiHeadAttention(2, causal=False)
        bidirectional.build((None, None, WIDTH))
        bidirectional.create_cache(1, 8)
    for unbuilt in (MultiHeadAttention(2), type(make("composite"))()):
        with raises(ValueError, "no weights yet", "`create_cache`"):
            unbuilt.create_cache(1, 8)
    with raises(ValueError, "`batch_size`", "batch_size=0"):
        layer.create_cache(0, 8)
    with raises(TypeError, "`max_length`", "max_length=8.0"):
        layer.create_cache(1, 8.0)


def test_a_cache_can_not_shrink(layer, cache):
    with raises(ValueError, "`max_length=8`", layer.name):
        layer.grow_cache(cache, 8)
    with raises(ValueError, "1 slots", "2 cached calls"):
        grow_cache((layer, layer), (cache,), 16)


def test_a_source_that_is_the_query_itself(layer, cache):
    """As Keras's attention layers are called; padded tokens stay hidden."""
    x, mask = sample(length=4), ragged(4, 2, 1, length=4)
    given = {"cache": cache, "cache_update_index": 0}
    expected, _ = layer(x, padding_mask=mask, **given)
    for arguments in ((x, x), (x, x, x)):
        outputs, _ = layer(*arguments, padding_mask=mask, **given)
        assert_close(outputs, expected, atol=1e-6)
        assert_close(layer(*arguments, padding_mask=mask), expected, atol=1e-5)


def test_a_cache_before_the_first_call():
    layer = MultiHeadAttention(2, key_dim=3, value_dim=5)
    cache = layer.create_cache(1, 8)
    assert tuple(cache["key"].shape) == (1, 2, 3, 8)
    _, cache = layer(np.ones((1, 4, 8)), cache=cache, cache_update_index=0)
    assert tuple(cache["value"].shape) == (1, 2, 8, 5)


@pytest.mark.parametrize("shape", [(BATCH, 5), (1, 4), (2, 4), (4,), (BATCH, 1, 4)])
def test_padding_masks_of_other_tokens(layer, cache, shape):
    x = secret(BATCH, 4, WIDTH)
    for given in ({}, {"cache": cache, "cache_update_index": 0}):
        with raises(ValueError, "`padding_mask`", str(shape), "(batch, length)"):
            layer(x, padding_mask=np.ones(shape, bool), **given)
    # It would broadcast over one token.
    with raises(ValueError, "`padding_mask`", str(shape)):
        layer(x[:, :1], padding_mask=np.ones(shape, bool), **given)


@pytest.mark.parametrize(
    "shape", [(4, 4), (BATCH, 1, 4, 4), (BATCH, 4, 3), (BATCH, 3, 4), (2, 4, 4)]
)
def test_attention_masks_of_other_shapes(layer, shape):
    x = secret(BATCH, 4, WIDTH)
    with raises(ValueError, "`attention_mask`", str(shape), "key_length"):
        layer(x, attention_mask=np.ones(shape, bool))


def test_learned_positions_exceeded():
    layer = make("position_embedding")
    with raises(ValueError, "12 positions", "position 13", "Shorten"):
        layer(secret(BATCH, 13, WIDTH))
    with raises(ValueError, "position 14", "cache_update_index=12"):
        layer(secret(BATCH, 2, WIDTH), cache=(), cache_update_index=12)
    inputs = keras.Input((None, WIDTH))
    model = keras.Model(inputs, layer(inputs))
    with raises(ValueError, "12 positions", "max_length=13"):
        create_cache(model, 1, 13)
