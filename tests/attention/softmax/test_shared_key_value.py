"""`return_key_value` and `SharedKeyValueAttention`: one producer, several readers."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    AlibiBias,
    GroupedQueryAttention,
    RelativePositionBias,
    RotaryPosition,
    SharedKeyValueAttention,
    call_with_cache,
    create_cache,
)
from attention.positions.arithmetic import HIDDEN_POSITION
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    assert_close,
    compiled,
    gradients,
    randomize,
    sample,
    to_numpy,
)

SETTINGS = {
    "plain": {"num_heads": 4, "num_key_value_heads": 4},
    "grouped": {"num_heads": 4, "num_key_value_heads": 2},
    "one": {"num_heads": 4, "num_key_value_heads": 1, "use_bias": False},
    "rotary": {"num_heads": 4, "num_key_value_heads": 2, "position": RotaryPosition},
    "alibi": {"num_heads": 4, "num_key_value_heads": 2, "position": AlibiBias},
    "t5": {"num_heads": 4, "num_key_value_heads": 4, "position": RelativePositionBias},
    "value_dim": {
        "num_heads": 4,
        "num_key_value_heads": 2,
        "value_dim": 6,
        "key_dim": 8,
    },
    "scale": {"num_heads": 4, "num_key_value_heads": 4, "scale": 0.3},
}


def make_pair(name):
    """A producer, and a reader with its query and output weights."""
    position = SETTINGS[name].get("position")
    pair = []
    for cls in (GroupedQueryAttention, SharedKeyValueAttention):
        settings = dict(SETTINGS[name])
        if position is not None:
            settings["position"] = position()
        layer = cls(**settings)
        layer.build((None, None, WIDTH))
        pair.append(randomize(layer))
    producer, reader = pair
    for part in ("query_dense", "output_dense"):
        getattr(reader, part).set_weights(getattr(producer, part).get_weights())
    if name == "t5":
        reader.position.set_weights(producer.position.get_weights())
    return producer, reader


every_setting = pytest.mark.parametrize("name", SETTINGS)


def ragged_mask(lengths, width):
    return np.arange(width)[None] < np.array(lengths)[:, None]


# === As the producer itself ===


@every_setting
def test_a_reader_with_the_producers_weights_gives_its_outputs(name):
    producer, reader = make_pair(name)
    x = sample()
    outputs, key_value = producer(x, return_key_value=True)
    assert_close(outputs, producer(x))
    assert_close(reader(x, key_value), outputs)
    expected, scores = producer(x, return_attention_scores=True)
    outputs, reader_scores = reader(x, key_value, return_attention_scores=True)
    assert_close(outputs, expected)
    assert_close(reader_scores, scores)


@every_setting
def test_padded_rows(name):
    producer, reader = make_pair(name)
    x, mask = sample(), ragged_mask([5, 12, 1], LENGTH)
    outputs, key_value = producer(x, padding_mask=mask, return_key_value=True)
    positions = to_numpy(key_value["positions"])
    assert (positions[~mask] == HIDDEN_POSITION).all()
    np.testing.assert_array_equal(positions[1], np.arange(LENGTH))
    assert_close(reader(x, key_value, padding_mask=mask), outputs)
    x[~mask] = np.inf
    outputs = to_numpy(reader(x, key_value, padding_mask=mask))
    assert np.isfinite(outputs).all()


@every_setting
@pytest.mark.parametrize("per_row", [False, True])
def test_decoding_equals_the_full_forward(name, per_row):
    producer, reader = make_pair(name)
    x = sample()
    y, key_value = producer(x, return_key_value=True)
    full = to_numpy(reader(y, key_value))
    cache, start = producer.create_cache(BATCH, LENGTH + 4), 0
    for size in (5, 1, 4, 1, 1):
        index = np.full((BATCH,), start) if per_row else start
        (y, key_value), cache = producer(
            x[:, start : start + size],
            cache=cache,
            cache_update_index=index,
            return_key_value=True,
        )
        outputs, nothing = reader(y, key_value, cache=(), cache_update_index=index)
        assert nothing == ()
        assert_close(outputs, full[:, start : start + size])
        start += size


@every_setting
def test_rows_at_positions_of_their_own(name):
    producer, reader = make_pair(name)
    x, lengths = sample(), np.array([3, 7, 5], "int32")
    _, key_value = producer(x, return_key_value=True)
    full = to_numpy(reader(x, key_value))
    mask = ragged_mask(lengths, 7)
    cache = producer.create_cache(BATCH, LENGTH)
    settings = {"cache": cache, "cache_update_index": 0, "padding_mask": mask}
    (_, key_value), cache = producer(x[:, :7], return_key_value=True, **settings)
    outputs, _ = reader(x[:, :7], key_value, **{**settings, "cache": ()})
    assert_close(to_numpy(outputs)[mask], full[:, :7][mask])
    rows = np.arange(BATCH)
    for _ in range(3):
        token = x[rows, lengths][:, None]
        settings = {"cache_update_index": lengths}
        (_, key_value), cache = producer(
            token, cache=cache, return_key_value=True, **settings
        )
        outputs, _ = reader(token, key_value, cache=(), **settings)
        assert_close(to_numpy(outputs)[:, 0], full[rows, lengths])
        lengths = lengths + 1


def test_a_compiled_step():
    producer, reader = make_pair("rotary")
    x = sample()
    _, key_value = producer(x, return_key_value=True)
    full = to_numpy(reader(x, key_value))

    @compiled
    def step(x, cache, index):
        settings = {"cache_update_index": index}
        (_, key_value), cache = producer(
            x, cache=cache, return_key_value=True, **settings
        )
        outputs, _ = reader(x, key_value, cache=(), **settings)
        return outputs, cache

    cache = producer.create_cache(BATCH, LENGTH)
    for i in range(LENGTH):
        index = ops.convert_to_tensor(np.full((BATCH,), i, "int32"))
        token = ops.convert_to_tensor(x[:, i : i + 1])
        outputs, cache = step(token, cache, index)
        assert_close(outputs, full[:, i : i + 1])


# === What is handed over ===


def test_a_cache_is_handed_over_as_it_is():
    producer, _ = make_pair("grouped")
    x, cache = sample(), producer.create_cache(BATCH, 16)
    # The first tokens attend to each other, and so do those of a reader.
    (_, key_value), cache = producer(
        x[:, :4], cache=cache, cache_update_index=0, return_key_value=True
    )
    assert tuple(key_value["positions"].shape) == (BATCH, 4)
    (_, key_value), cache = producer(
        x[:, 4:], cache=cache, cache_update_index=4, return_key_value=True
    )
    assert tuple(key_value["key"].shape) == tuple(key_value["value"].shape)
    keys = np.swapaxes(to_numpy(cache["key"]), 2, 3)
    np.testing.assert_array_equal(to_numpy(key_value["key"]), keys)
    assert key_value["value"] is cache["value"]
    assert tuple(key_value["positions"].shape) == (BATCH, 16)
    assert keras.backend.standardize_dtype(key_value["positions"].dtype) == "int32"


def test_both_scores_and_keys():
    producer, _ = make_pair("grouped")
    x, cache = sample(), producer.create_cache(BATCH, LENGTH)
    both = {"return_attention_scores": True, "return_key_value": True}
    outputs, scores, key_value = producer(x, **both)
    assert tuple(scores.shape) == (BATCH, 4, LENGTH, LENGTH)
    assert tuple(key_value["key"].shape) == (BATCH, 2, LENGTH, 4)
    (cached, *_), _ = producer(x, cache=cache, cache_update_index=0, **both)
    assert_close(cached, outputs)


def test_keys_of_another_source():
    producer, reader = make_pair("rotary")
    x, source = sample(), sample(length=5, seed=1)
    outputs, key_value = producer(x, source, return_key_value=True)
    assert tuple(key_value["key"].shape) == (BATCH, 2, 5, 4)
    assert_close(reader(x, key_value), outputs)


# === A NumPy reference ===


def reference(reader, x, key_value, bias=0.0):
    """Grouped attention to given keys and values, by positions."""
    weights = {w.path.split("/", 1)[1]: to_numpy(w) for w in reader.weights}
    q = np.einsum("blw,whd->bhld", x, weights["query/kernel"])
    q = q + weights["query/bias"][:, None]
    k, v = (np.repeat(key_value[name], 2, axis=1) for name in ("key", "value"))
    logits = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
    positions = key_value["positions"][:, None, None]
    seen = positions <= np.arange(x.shape[1])[:, None]
    logits = np.where(seen, logits, -np.inf)
    logits = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores = logits / logits.sum(axis=-1, keepdims=True)
    attended = np.einsum("bhqk,bhkd->bqhd", scores, v)
    outputs = np.einsum("bqhd,hdw->bqw", attended, weights["attention_output/kernel"])
    return outputs + weights["attention_output/bias"]


def scattered_key_value(seed=3):
    """Keys in slots of no order, as in a ring, two of which are padding."""
    rng = np.random.default_rng(seed)
    positions = np.stack([rng.permutation(9) for _ in range(BATCH)]).astype("int32")
    positions[:, 0], positions[:, 1] = 0, HIDDEN_POSITION
    return {
        "key": rng.normal(size=(BATCH, 2, 9, 4)).astype("float32"),
        "value": rng.normal(size=(BATCH, 2, 9, 4)).astype("float32"),
        "positions": positions,
    }


@pytest.mark.parametrize("num_key_value_heads", [None, 2])
def test_against_numpy(num_key_value_heads):
    reader = SharedKeyValueAttention(4, num_key_value_heads)
    reader.build((None, None, WIDTH))
    randomize(reader)
    x, key_value = sample(), scattered_key_value()
    assert_close(reader(x, key_value), reference(reader, x, key_value))


def test_alibi_against_numpy():
    reader = SharedKeyValueAttention(4, position=AlibiBias())
    reader.build((None, None, WIDTH))
    randomize(reader)
    x, key_value = sample(), scattered_key_value()
    distance = np.arange(LENGTH)[:, None] - key_value["positions"][:, None, None]
    slopes = 2.0 ** (-2 * np.arange(1, 5))[:, None, None]
    expected = reference(reader, x, key_value, bias=-slopes * np.abs(distance))
    assert_close(reader(x, key_value), expected)


def test_attention_mask_counts_positions():
    producer, reader = make_pair("grouped")
    x = sample()
    mask = np.random.default_rng(0).random((BATCH, LENGTH, LENGTH)) < 0.6
    outputs, key_value = producer(x, attention_mask=mask, return_key_value=True)
    assert_close(reader(x, key_value, attention_mask=mask), outputs)
    shared = mask[:1]
    expected = producer(x, attention_mask=shared)
    assert_close(reader(x, key_value, attention_mask=shared), expected)
    cache = producer.create_cache(BATCH, 20)
    settings = {"cache_update_index": 0}
    (_, key_value), _ = producer(x, cache=cache, return_key_value=True, **settings)
    cached, _ = reader(x, key_value, attention_mask=mask, cache=(), **settings)
    assert_close(cached, outputs)


# === In models ===


def make_model():
    inputs = keras.Input((None, WIDTH))
    x, key_value = GroupedQueryAttention(4, 2, position=RotaryPosition())(
        inputs, return_key_value=True
    )
    for _ in range(2):
        reader = SharedKeyValueAttention(4, position=RotaryPosition())
        x = x + reader(x, key_value)
    return randomize(keras.Model(inputs, x))


def test_a_functional_model(tmp_path):
    model, x = make_model(), sample()
    full = to_numpy(model(x))
    cache = create_cache(model, BATCH, LENGTH)
    assert cache[1:] == ((), ())
    head, cache = call_with_cache(model, x[:, :7], cache, 0)
    tail, cache = call_with_cache(model, x[:, 7:], cache, 7)
    assert_close(np.concatenate([to_numpy(head), to_numpy(tail)], axis=1), full)
    model.save(tmp_path / "model.keras")
    assert_close(keras.models.load_model(tmp_path / "model.keras")(x), full)


def test_gradients_reach_the_producer_through_its_readers():
    model = make_model()
    names = [weight.path for weight in model.trainable_weights]
    for name, gradient in zip(names, gradients(model, ops.convert_to_tensor(sample()))):
        if not name.endswith("key/bias"):
            assert np.abs(gradient).max() > 1e-6, name


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "float16"])
def test_low_precision(dtype):
    producer = GroupedQueryAttention(4, 2, dtype=dtype)
    reader = SharedKeyValueAttention(4, dtype=dtype)
    x = sample()
    _, key_value = producer(x, return_key_value=True)
    outputs = reader(x, key_value)
    assert keras.backend.standardize_dtype(outputs.dtype) == reader.compute_dtype
    exact = SharedKeyValueAttention(4)
    exact.build((None, None, WIDTH))
    exact.set_weights([to_numpy(weight) for weight in reader.weights])
    assert_close(outputs, exact(x, key_value), atol=5e-2)


def test_dropout_in_training_only():
    producer, _ = make_pair("plain")
    reader = SharedKeyValueAttention(4, dropout=0.5)
    x = sample()
    _, key_value = producer(x, return_key_value=True)
    assert_close(reader(x, key_value), reader(x, key_value, training=False))
    trained = reader(x, key_value, training=True)
    assert np.abs(to_numpy(trained) - to_numpy(reader(x, key_value))).max() > 1e-3


def test_config_round_trip():
    reader = SharedKeyValueAttention(
        4,
        2,
        key_dim=8,
        value_dim=6,
        dropout=0.1,
        use_bias=False,
        position=RotaryPosition(max_wavelength=50),
        scale=0.5,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.1),
        bias_initializer="ones",
        dtype="mixed_bfloat16",
        name="reader",
    )
    config = keras.saving.serialize_keras_object(reader)
    assert config["registered_name"].startswith("keras_transformer_blocks>")
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is SharedKeyValueAttention
    assert restored.get_config() == reader.get_config()
    assert restored.position.max_wavelength == 50
