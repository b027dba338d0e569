"""Kernels that a loop is handed as matrices are the layers' own kernels."""

import keras
import numpy as np

from blocks.generation.backends.loop_kernels import LoopKernels
from tests.helpers import assert_close

IS_TENSORFLOW = keras.config.backend() == "tensorflow"


def make_layers():
    heads = keras.layers.EinsumDense("blw,whd->blhd", (None, 2, 3))
    joined = keras.layers.EinsumDense("bqhk,hkw->bqw", (None, 4))
    dense = keras.layers.Dense(5)
    heads.build((None, None, 4))
    joined.build((None, None, 2, 3))
    dense.build((None, 4))
    return [heads, joined, dense, keras.layers.LayerNormalization()]


def shapes_of(layers):
    return [tuple(x.shape) for x in LoopKernels(layers).before_loop()]


def test_matrices_have_inputs_as_rows():
    assert shapes_of(make_layers()) == ([(4, 6), (6, 4)] if IS_TENSORFLOW else [])


def test_an_adapted_kernel_is_left_alone():
    layers = make_layers()
    layers[0].enable_lora(2)
    assert shapes_of(layers) == ([(6, 4)] if IS_TENSORFLOW else [])


def test_layers_find_their_kernels_in_the_scope():
    heads, joined, *rest = make_layers()
    x = np.random.default_rng(0).normal(size=(2, 1, 4)).astype("float32")
    kernels = LoopKernels([heads, joined, *rest])
    matrices = kernels.before_loop()
    expected = joined(heads(x))
    # It is these matrices that are read, not the variables.
    for factor in (1, 2):
        with kernels.within_loop([factor * matrix for matrix in matrices]):
            outputs = joined(heads(x))
        assert_close(outputs, (factor**2 if IS_TENSORFLOW else 1) * expected)


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
