"""Configurations come back as they were, and saved models compute the same."""

import json

import keras
import pytest

from attention import (
    AlibiBias,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    PositionEmbedding,
    RelativePositionBias,
    RotaryAttention,
    RotaryPosition,
    SharedKeyValueAttention,
    T5Attention,
)
from tests.helpers import (
    LLAMA3,
    WIDTH,
    YARN,
    assert_close,
    randomize,
    sample,
)

COMMON = {
    "key_dim": 6,
    "value_dim": 10,
    "dropout": 0.25,
    "use_bias": False,
    "causal": False,
    "scale": 0.5,
    "kernel_initializer": keras.initializers.RandomNormal(stddev=0.02, seed=3),
    "bias_initializer": "ones",
    "name": "mine",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}
READER = {name: x for name, x in COMMON.items() if name != "causal"}
OBJECTS = [
    GroupedQueryAttention(6, 3, position=RotaryPosition(500, LLAMA3), **COMMON),
    MultiHeadAttention(6, position=AlibiBias(), **COMMON),
    MultiQueryAttention(6, position=RelativePositionBias(8, 20, True), **COMMON),
    RotaryAttention(6, 3, max_wavelength=500, scaling=YARN, **COMMON),
    T5Attention(6, num_buckets=8, max_distance=20, **COMMON),
    T5Attention(6, scale=None),
    PositionEmbedding(20, initializer="ones", name="mine", dtype="float16"),
    RotaryPosition(500, YARN, name="mine"),
    RelativePositionBias(8, 20, True, "ones", name="mine"),
    AlibiBias(name="mine"),
    SharedKeyValueAttention(4, 2, position=RotaryPosition(50), **READER),
]


@pytest.mark.parametrize("layer", OBJECTS, ids=lambda x: type(x).__name__)
def test_a_configuration_comes_back(layer):
    config = layer.get_config()
    again = type(layer).from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    # As a model's file has it: the class is found by its registered name.
    saved = keras.saving.serialize_keras_object(layer)
    assert saved["registered_name"].startswith("keras_transformer_blocks>")
    found = keras.saving.deserialize_keras_object(json.loads(json.dumps(saved)))
    assert type(found) is type(layer)
    assert found.get_config() == config


def test_every_argument_is_in_the_configuration():
    config = OBJECTS[0].get_config()
    for name, value in COMMON.items():
        if name not in ("kernel_initializer", "bias_initializer", "dtype"):
            assert config[name] == value, name
    assert config["num_heads"], config["num_key_value_heads"] == (6, 3)
    assert config["kernel_initializer"]["config"]["stddev"] == 0.02
    assert "num_key_value_heads" not in OBJECTS[1].get_config()
    assert OBJECTS[3].get_config()["scaling"] == YARN
    assert OBJECTS[4].get_config()["max_distance"] == 20


def test_a_saved_model_with_a_shared_scheme_shares_it_again(tmp_path):
    shared = RelativePositionBias(8, 10)
    inputs = keras.Input((None, WIDTH))
    x = MultiHeadAttention(4, position=shared)(inputs)
    x = GroupedQueryAttention(4, 2, position=shared)(x)
    model = randomize(keras.Model(inputs, x))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    first, second = again.layers[1:]
    assert first.position is second.position
    assert_close(again(sample()), model(sample()), atol=0)
    assert len(again.weights) == len(model.weights)
