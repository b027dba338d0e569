"""The tanh approximation of GELU, which has a gradient of its own on TensorFlow."""

import numpy as np
import pytest
from keras import ops

from blocks import gelu_approximate
from blocks.training.gradients import value_and_gradients


def formula(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("float16", 5e-3)])
def test_outputs_and_gradients_equal_the_formula(dtype, error):
    x = np.concatenate([np.linspace(-8, 8, 201), [-30.0, 30.0]])
    given = ops.cast(x, dtype)
    rounded = ops.convert_to_numpy(given).astype("float64")
    upstream = ops.cast(np.arange(len(x)) % 7, dtype)

    def total(x):
        outputs = gelu_approximate(x)
        return ops.concatenate([ops.sum(outputs * upstream)[None], outputs])

    found, (gradient,) = value_and_gradients(total, [given])
    step = 1e-5
    slope = (formula(rounded + step) - formula(rounded - step)) / (2 * step)
    found, gradient = map(ops.convert_to_numpy, (found[1:], gradient))
    np.testing.assert_allclose(found, formula(rounded), rtol=error, atol=error)
    expected = slope * ops.convert_to_numpy(upstream)
    np.testing.assert_allclose(gradient, expected, rtol=error, atol=7 * error)


def test_large_numbers_of_half_precision_have_gradients():
    for number, expected in ((3e4, 1), (-3e4, 0)):
        given = ops.cast(np.full((1,), number), "bfloat16")
        _, (gradient,) = value_and_gradients(gelu_approximate, [given])
        assert float(ops.cast(gradient, "float32")[0]) == expected
