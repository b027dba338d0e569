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
from tests.helpers import LLAMA3, WIDTH, YARN, assert_close, randomize, sample

COMMON = {
    "key_dim": 6,
    "value_dim": 10,
    "dropout": 0.25,
    "use_bias": False,
    "causal": False,
    "scale": 0.5,
    "kernel_initializer": keras.initializers.RandomNormal(stddev=0.02, seed=3),
    "bias_initializer": keras.initializers.Ones(),
    "name": "mine",
    "dtype": keras.DTypePolicy("mixed_bfloat16"),
    "trainable": False,
}
READER = {name: x for name, x in COMMON.items() if name != "causal"}
GROUPS = {"num_heads": 6, "num_key_value_heads": 3}
T5 = {"num_heads": 6, "num_buckets": 8, "max_distance": 20}
ROTARY = {"max_wavelength": 500, "scaling": YARN}
BUCKETS = {"num_buckets": 8, "max_distance": 20, "bidirectional": True}
OBJECTS = [
    (
        GroupedQueryAttention,
        {**GROUPS, "position": RotaryPosition(500, LLAMA3), **COMMON},
    ),
    (MultiHeadAttention, {"num_heads": 6, "position": AlibiBias(), **COMMON}),
    (MultiQueryAttention, {"num_heads": 6, **COMMON}),
    (RotaryAttention, {**GROUPS, **ROTARY, **COMMON}),
    (T5Attention, {**T5, **COMMON}),
    (T5Attention, {"num_heads": 6, "scale": None}),
    (PositionEmbedding, {"sequence_length": 20, "name": "mine"}),
    (RotaryPosition, {**ROTARY, "name": "mine"}),
    (RelativePositionBias, {**BUCKETS, "name": "mine"}),
    (AlibiBias, {"name": "mine"}),
    (SharedKeyValueAttention, {**GROUPS, "position": RotaryPosition(50), **READER}),
]


@pytest.mark.parametrize("cls, arguments", OBJECTS)
def test_a_configuration_holds_all_arguments_and_comes_back(cls, arguments):
    layer = cls(**arguments)
    config = layer.get_config()
    for name, value in arguments.items():
        if hasattr(value, "get_config"):
            value = keras.saving.serialize_keras_object(value)
        assert config[name] == value, name
    # As a model's file has it: the class is found by its registered name.
    saved = keras.saving.serialize_keras_object(layer)
    assert saved["registered_name"].startswith("keras_transformer_blocks>")
    found = keras.saving.deserialize_keras_object(json.loads(json.dumps(saved)))
    assert type(found) is cls
    assert found.get_config() == config
    assert cls.from_config(json.loads(json.dumps(config))).get_config() == config


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


def test_t5s_layers_share_a_table_again(tmp_path):
    inputs = keras.Input((None, WIDTH))
    first = T5Attention(2)
    second = T5Attention(2, position=first.position)
    model = keras.Model(inputs, second(first(inputs)))
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    first, second = restored.layers[1:]
    assert first.position is second.position
    assert_close(restored(sample()), model(sample()))
    assert T5Attention.from_config(T5Attention(2).get_config()).position is not None
