"""Layers, inputs and ways of running them that many tests share."""

import importlib.util
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    AlibiBias,
    CachedLayer,
    CompositeCachedLayer,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    PositionEmbedding,
    RelativePositionBias,
    RotaryAttention,
    RotaryPosition,
    SharedKeyValueAttention,
    T5Attention,
    last_tokens,
)
from attention.testing import backends
from attention.testing.backends import compile_call as compiled
from attention.testing.backends import to_numpy


def slow(value):
    """A parameter of a test that takes long, and is the same on every backend."""
    return pytest.param(value, marks=pytest.mark.slow)


def load_example(name):
    """The module of `examples/`."""
    path = pathlib.Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BATCH, LENGTH, WIDTH = 3, 12, 16

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@keras.saving.register_keras_serializable(package="tests")
class Shift(CachedLayer):
    """Adds the token before: padding that gets into its cache is seen at once."""

    def build(self, inputs_shape):
        self.width = inputs_shape[-1]

    def create_cache(self, batch_size, max_length):
        return ops.zeros((batch_size, 1, self.width), self.compute_dtype)

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        past = ops.zeros_like(x[:, :1]) if cache is None else cache
        seen = ops.concatenate([past, x], axis=1)
        outputs = x + seen[:, :-1]
        return outputs if cache is None else (outputs, last_tokens(seen, padding_mask))


@keras.saving.register_keras_serializable(package="tests")
class EmbedAndAttendTwice(CompositeCachedLayer):
    """A composite with learned positions, and one attention called twice."""

    def build(self, inputs_shape):
        self.positions = PositionEmbedding(LENGTH, initializer="random_normal")
        self.positions.build(inputs_shape)
        self.norm = keras.layers.LayerNormalization()
        self.norm.build(inputs_shape)
        self.attend = RotaryAttention(4, 2)
        self.attend.build(inputs_shape)

    def transform(self, x, padding_mask=None, training=None):
        x = x + self.positions(x)
        x = x + self.attend(self.norm(x))
        return x + self.attend(x)


@keras.saving.register_keras_serializable(package="tests")
class ProducerAndReader(CompositeCachedLayer):
    """Keys and values of one attention layer that another one reads, too."""

    def build(self, inputs_shape):
        self.producer = RotaryAttention(4, 2, dtype=self.dtype_policy)
        self.producer.build(inputs_shape)
        self.reader = SharedKeyValueAttention(
            4, position=RotaryPosition(), dtype=self.dtype_policy
        )
        self.reader.build(inputs_shape)

    def transform(self, x, padding_mask=None):
        y, key_value = self.producer(x, return_key_value=True)
        return y + self.reader(x, key_value)


VARIANTS = {
    "multi_head": lambda: MultiHeadAttention(4),
    "multi_query": lambda: MultiQueryAttention(4),
    "grouped": lambda: GroupedQueryAttention(4, 2),
    "rotary": lambda: RotaryAttention(4),
    "rotary_grouped": lambda: RotaryAttention(4, 2, max_wavelength=50, use_bias=False),
    "rotary_linear": lambda: RotaryAttention(4, 2, scaling=LINEAR),
    "rotary_llama3": lambda: RotaryAttention(4, 2, scaling=LLAMA3),
    "rotary_yarn": lambda: RotaryAttention(4, 2, scaling=YARN),
    "t5": lambda: T5Attention(4, num_buckets=8, max_distance=10),
    "t5_grouped": lambda: GroupedQueryAttention(
        4, 2, position=RelativePositionBias(8, 10)
    ),
    "alibi": lambda: MultiHeadAttention(4, position=AlibiBias()),
    "alibi_grouped_6": lambda: GroupedQueryAttention(
        6, 3, key_dim=4, position=AlibiBias()
    ),
    "value_dim": lambda: MultiHeadAttention(4, value_dim=6),
    "position_embedding": lambda: PositionEmbedding(LENGTH, "random_normal"),
    "composite": EmbedAndAttendTwice,
}
ATTENTIONS = [
    name for name in VARIANTS if name not in ("position_embedding", "composite")
]


def make(name, seed=0):
    """A built layer in which all weights, biases too, are random."""
    layer = VARIANTS[name]()
    layer.build((None, None, WIDTH))
    return randomize(layer, seed)


def randomize(layer, seed=0, scale=0.4):
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(rng.normal(scale=scale, size=tuple(variable.shape)))
    return layer


def sample(batch=BATCH, length=LENGTH, width=WIDTH, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, length, width)).astype("float32")


def assert_close(actual, expected, atol=2e-5):
    np.testing.assert_allclose(to_numpy(actual), to_numpy(expected), atol=atol, rtol=0)


def as_index(kind, position, batch=BATCH):
    """An index as an int, an integer scalar tensor or one entry per row."""
    if kind == "int":
        return position
    if kind == "scalar":
        return ops.convert_to_tensor(position, dtype="int32")
    return ops.convert_to_tensor(np.full((batch,), position), dtype="int32")


def compiled_on_jax(function):
    """Compiled there, where each operation is else compiled by itself."""
    return compiled(function) if keras.config.backend() == "jax" else function


def called(layer, **kwargs):
    """The layer's call without a cache, by `compiled_on_jax`."""
    return compiled_on_jax(lambda x: layer(x, **kwargs))


def run_chunks(layer, x, sizes, kinds=("int",), capacity=LENGTH, **kwargs):
    """Runs the sequence in chunks; returns the joined outputs and the cache."""

    def function(static):
        def call(x, cache, index):
            index = index if static is None else static
            return layer(x, cache=cache, cache_update_index=index, **kwargs)

        return compiled_on_jax(call)

    functions = {}
    cache = layer.create_cache(x.shape[0], capacity)
    outputs, start = [], 0
    for i, size in enumerate(sizes):
        index = as_index(kinds[i % len(kinds)], start, x.shape[0])
        static = index if isinstance(index, int) else None
        call = functions.setdefault(static, function(static))
        chunk, cache = call(
            x[:, start : start + size], cache, index if static is None else None
        )
        outputs.append(to_numpy(chunk))
        start += size
    return np.concatenate(outputs, axis=1), cache


def gradients(layer, x, **kwargs):
    """The gradients of the sum of squared outputs for the trainable weights."""

    def loss(_):
        return ops.sum(ops.square(layer(x, **kwargs)))

    return backends.gradients(loss, list(layer.trainable_variables), [])


# === Formulas in NumPy ===


def rotate(x, base=10_000, dim=None):
    """`(length, ..., dim)`, each pair of the first `dim` numbers turned as a complex one."""
    dim = dim or x.shape[-1]
    turns = np.arange(len(x))[:, None] * base ** (-np.arange(0, dim, 2) / dim)
    turns = turns.reshape(len(x), *[1] * (x.ndim - 2), dim // 2)
    turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 : dim]) * np.exp(1j * turns)
    return np.concatenate([turned.real, turned.imag, x[..., dim:]], axis=-1)


def rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


# A value no message may contain.
SECRET = 0.123456


def secret(*shape, dtype="float32"):
    return np.full(shape, SECRET).astype(dtype)


def raises(kind, *parts):
    """All parts must stand in the message, and no contents of a tensor."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(kind, match=rf"(?s)^(?!.*{SECRET}){pattern}")
