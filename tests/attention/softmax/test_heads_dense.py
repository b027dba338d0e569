"""Tests projections to heads and from heads."""

import keras
import numpy as np
import pytest

from attention.softmax.heads_dense import HeadsDense

TO_HEADS = ("blw,whd->blhd", (2, 4, 6))
FROM_HEADS = ("bqhk,hkw->bqw", (2, 4, 3, 2))


def make(cls, equation, outputs, shape):
    axes = equation.split("->")[1][2:]
    layer = cls(equation, (None, *outputs), bias_axes=axes, bias_initializer="normal")
    layer.build(shape)
    return layer


# Of as many heads of size 1 as tokens, too: Keras adds such a bias along the length, on
# TensorFlow.
@pytest.mark.parametrize(
    "case, outputs", [(TO_HEADS, (3, 2)), (TO_HEADS, (4, 1)), (FROM_HEADS, (5,))]
)
def test_it_equals_the_formula(case, outputs):
    equation, shape = case
    layer = make(HeadsDense, equation, outputs, shape)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    kernel, bias = layer.get_weights()
    expected = np.einsum(equation, x, kernel) + bias
    found = keras.ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("case, outputs", [(TO_HEADS, (3, 2)), (FROM_HEADS, (5,))])
def test_lora_and_quantization_are_those_of_keras(case, outputs):
    equation, shape = case
    ours, keras_own = (
        make(cls, equation, outputs, shape)
        for cls in (HeadsDense, keras.layers.EinsumDense)
    )
    for layer in (ours, keras_own):
        layer.enable_lora(2)
    keras_own.set_weights(
        [np.random.default_rng(1).normal(size=x.shape) for x in keras_own.weights]
    )
    ours.set_weights(keras_own.get_weights())
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    np.testing.assert_allclose(
        *(keras.ops.convert_to_numpy(y(x)) for y in (ours, keras_own)), atol=1e-5
    )
    for layer in (ours, keras_own):
        layer.quantize("int8")
    np.testing.assert_allclose(
        *(keras.ops.convert_to_numpy(y(x)) for y in (ours, keras_own)), atol=1e-5
    )
