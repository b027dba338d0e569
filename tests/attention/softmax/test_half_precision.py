"""Attention in half precision, with numbers as large as published models have.

Inputs and kernels are such that heads are exact in half precision: what differs from
float32 comes from logits, weights and outputs."""

import numpy as np
import pytest
from keras import ops

from attention import (
    AlibiBias,
    DifferentialAttention,
    GroupedQueryAttention,
    LatentAttention,
    MultiHeadAttention,
)
from tests.helpers import LENGTH, WIDTH, check_outputs, to_numpy

LAYERS = {
    "grouped": lambda **kw: GroupedQueryAttention(4, 2, **kw),
    "multi_head": lambda **kw: MultiHeadAttention(4, **kw),
    "window": lambda **kw: GroupedQueryAttention(4, 2, window=4, **kw),
    "alibi": lambda **kw: MultiHeadAttention(4, position=AlibiBias(), **kw),
    "sinks": lambda **kw: MultiHeadAttention(4, attention_sinks=True, **kw),
    "soft_cap": lambda **kw: MultiHeadAttention(4, logit_soft_cap=9.0, **kw),
    "latent": lambda **kw: LatentAttention(4, **kw),
    "differential": lambda **kw: DifferentialAttention(2, **kw),
}
# The first overflows what float16 holds; bfloat16 rounds the products of the second to
# whole numbers and worse.
SCALES = {"float16": 200.0, "bfloat16": 20.0}
CASES = [(name, "float16") for name in LAYERS]
CASES += [(name, "bfloat16") for name in ("grouped", "window", "sinks")]


def selection(shape, rng):
    """Returns a kernel each of whose outputs is one of the inputs, with a sign."""
    kernel = np.zeros((shape[0], np.prod(shape[1:])), "float32")
    outputs = np.arange(kernel.shape[1])
    signs = rng.choice([-1, 1], len(outputs))
    kernel[rng.integers(0, shape[0], len(outputs)), outputs] = signs
    return kernel.reshape(shape)


def in_both(name, dtype):
    """Returns a layer in half precision and one in float32, with equal weights."""
    layers = [LAYERS[name](dtype=x) for x in (dtype, "float32")]
    for layer in layers:
        layer.build((None, None, WIDTH))
    rng = np.random.default_rng(7)
    for weight, exact in zip(*(layer.weights for layer in layers)):
        if weight.name == "kernel" or weight.name.endswith("_up"):
            exact.assign(selection(exact.shape, rng))
        weight.assign(exact)
    return layers


@pytest.mark.parametrize("name, dtype", CASES)
def test_logits_of_thousands(name, dtype):
    layer, exact = in_both(name, dtype)
    x = np.random.default_rng(1).normal(size=(2, LENGTH, WIDTH)) * SCALES[dtype]
    x = to_numpy(ops.cast(ops.convert_to_tensor(x.astype("float32")), dtype))
    expected = to_numpy(exact(x))
    # Weights and outputs are rounded, to 8 or 11 bits, and TensorFlow truncates.
    error = 6e-3 if dtype == "bfloat16" else 2e-3
    atol = error * np.abs(expected).max()
    check_outputs(layer, x, expected, (LENGTH - 1, 1), atol=atol)
