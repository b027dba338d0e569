"""Layers, inputs and ways of running them that many tests share."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import textwrap

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
    last_tokens,
)
from attention.testing import backends
from attention.testing.backends import compile_call as compiled
from attention.testing.backends import to_numpy

# Whether a model is best not compiled: tracing takes far longer than a few steps.
EAGER = keras.config.backend() == "tensorflow"


def slow(value):
    """A parameter of a test that takes long, and is the same on every backend."""
    return pytest.param(value, marks=pytest.mark.slow)


def run_script(script):
    """Runs an indented script in a process of its own, and returns what it wrote."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )


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
    "rotary": lambda: RotaryAttention(4, 2, max_wavelength=50, use_bias=False),
    "t5": lambda: GroupedQueryAttention(4, 2, position=RelativePositionBias(8, 10)),
    "alibi": lambda: GroupedQueryAttention(6, 3, key_dim=4, position=AlibiBias()),
    "position_embedding": lambda: PositionEmbedding(LENGTH, "random_normal"),
    "composite": EmbedAndAttendTwice,
}


def make(name):
    return built(VARIANTS[name]())


def built(layer, *shapes):
    """The layer, with random weights in place of all, biases too."""
    layer.build(*(shapes or [(None, None, WIDTH)]))
    return randomize(layer)


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


def run_chunks(layer, x, sizes, kinds=("int",), **kwargs):
    """Runs the sequence in chunks; returns the joined outputs and the cache."""

    def function(static):
        def call(x, cache, index):
            index = index if static is None else static
            return layer(x, cache=cache, cache_update_index=index, **kwargs)

        return compiled_on_jax(call)

    functions = {}
    cache = layer.create_cache(x.shape[0], max(x.shape[1], LENGTH))
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


def check_outputs(layer, x, expected, *plans, atol=2e-5, **kwargs):
    """Without a cache, and with one in chunks of these sizes."""
    assert_close(called(layer, **kwargs)(x), expected, atol)
    for sizes in plans:
        outputs, _ = run_chunks(layer, x, sizes, ("int", "scalar", "rows"), **kwargs)
        assert_close(outputs, expected, atol)


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


def dense(layer, x, axes=1):
    kernel, *bias = (to_numpy(w).astype("float64") for w in layer.weights)
    return np.tensordot(x, kernel, axes) + sum(bias)


def attention_formula(layer, x, source=None, visible=None):
    """Attention with its options, as their papers have it, one head at a time."""
    source = x if source is None else source
    q = dense(layer.query_dense, x)
    k, v = dense(layer.key_dense, source), dense(layer.value_dense, source)
    if layer.query_key_norm:
        q = rms_norm(q, to_numpy(layer.query_norm.scale), layer.norm_epsilon)
        k = rms_norm(k, to_numpy(layer.key_norm.scale), layer.norm_epsilon)
    if layer.position is not None:
        base, dim = layer.position.max_wavelength, layer.position.rotary_dim
        q, k = (np.stack([rotate(row, base, dim) for row in y]) for y in (q, k))
    if visible is None:
        visible = band(x.shape[1], layer.window) if layer.causal else np.array(True)
    visible = np.broadcast_to(visible, (len(x), x.shape[1], source.shape[1]))
    heads = np.zeros((*q.shape[:3], v.shape[-1]))
    scale = q.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    for row, head in np.ndindex(len(x), q.shape[2]):
        group = head // (q.shape[2] // k.shape[2])
        logits = q[row, :, head] @ k[row, :, group].T * scale
        if layer.logit_soft_cap is not None:
            logits = layer.logit_soft_cap * np.tanh(logits / layer.logit_soft_cap)
        weights = np.where(visible[row], np.exp(logits), 0)
        total = weights.sum(axis=-1, keepdims=True)
        if layer.attention_sinks:
            total = total + np.exp(to_numpy(layer.sinks)[head])
        # A query that sees nothing finds nothing.
        heads[row, :, head] = weights / np.maximum(total, 1e-30) @ v[row, :, group]
    if layer.output_gate:
        heads = heads / (1 + np.exp(-dense(layer.gate_dense, x)))
    return dense(layer.output_dense, heads, 2)


def band(length, window=None, causal=True):
    """Which keys each query sees: `(length, length)`."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = distance >= 0 if causal else np.ones(distance.shape, bool)
    return visible if window is None else visible & (np.abs(distance) < window)


def ragged(*lengths, length=LENGTH):
    """The mask of rows of which so many tokens are real."""
    return np.arange(length)[None] < np.array(lengths)[:, None]


# A value no message may contain.
SECRET = 0.123456


def secret(*shape, dtype="float32"):
    return np.full(shape, SECRET).astype(dtype)


def raises(kind, *parts):
    """All parts must stand in the message, and no contents of a tensor."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(kind, match=rf"(?s)^(?!.*{SECRET}){pattern}")
