"""Kernels that a loop is handed as matrices are the layers' own kernels."""

import keras
import numpy as np
import pytest

from blocks.generation.backends.loop_kernels import LoopKernels
from tests.helpers import to_numpy

IS_TENSORFLOW = keras.config.backend() == "tensorflow"


def make_layers():
    heads = keras.layers.EinsumDense("blw,whd->blhd", (None, 2, 3))
    joined = keras.layers.EinsumDense("bqhk,hkw->bqw", (None, 4))
    dense = keras.layers.Dense(5)
    heads.build((None, None, 4))
    joined.build((None, None, 2, 3))
    dense.build((None, 4))
    return [heads, joined, dense, keras.layers.LayerNormalization()]


@pytest.mark.skipif(not IS_TENSORFLOW, reason="nothing is done elsewhere")
def test_matrices_have_inputs_as_rows():
    matrices = LoopKernels(make_layers()).before_loop()
    assert [tuple(x.shape) for x in matrices] == [(4, 6), (6, 4)]


@pytest.mark.skipif(IS_TENSORFLOW, reason="on TensorFlow there are some")
def test_other_backends_need_none():
    assert LoopKernels(make_layers()).before_loop() == []


def test_layers_find_their_kernels_in_the_scope():
    heads, joined, *rest = make_layers()
    x = np.random.default_rng(0).normal(size=(2, 1, 4)).astype("float32")
    kernels = LoopKernels([heads, joined, *rest])
    matrices = kernels.before_loop()
    expected = joined(heads(x))
    with kernels.within_loop(matrices):
        outputs = joined(heads(x))
    np.testing.assert_allclose(to_numpy(outputs), to_numpy(expected), atol=1e-6)
    # It is these matrices that are read, not the variables.
    with kernels.within_loop([2 * matrix for matrix in matrices]):
        outputs = joined(heads(x))
    factor = 4 if IS_TENSORFLOW else 1
    np.testing.assert_allclose(
        to_numpy(outputs), factor * to_numpy(expected), atol=1e-5
    )


def test_what_a_layer_counts_is_not_lost():
    class Counted(keras.layers.EinsumDense):
        def build(self, shape):
            super().build(shape)
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x, training=None):
            self.calls.assign(self.calls + 1)
            return super().call(x)

    layer = Counted("blw,whd->blhd", (None, 2, 3))
    layer.build((None, None, 4))
    kernels = LoopKernels([layer])
    for _ in range(2):
        with kernels.within_loop(kernels.before_loop()):
            layer(np.ones((1, 1, 4), "float32"))
    assert float(layer.calls.value) == 2.0


def test_an_adapted_kernel_is_left_alone():
    heads, joined, *_ = make_layers()
    heads.enable_lora(2)
    matrices = LoopKernels([heads, joined]).before_loop()
    assert [tuple(x.shape) for x in matrices] == ([(6, 4)] if IS_TENSORFLOW else [])
