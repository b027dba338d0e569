"""Dense layers to heads and from heads."""

from __future__ import annotations

import math

import keras
from keras import ops

from attention.contract.inner_layers import Quantizable, add_bias
from attention.contract.types import Tensor


class HeadsDense(Quantizable, keras.layers.EinsumDense):
    """Projects to heads, or from heads, as one product of two matrices.

    On TensorFlow Keras makes a product for each row of the batch, and sums as many
    gradients of the kernel.

    Args:
        equation: str. `"blw,whd->blhd"` or `"bqhk,hkw->bqw"`, by any letters: first
            batch and length, then the axes that the kernel begins with.
        **kwargs: arguments of `keras.layers.EinsumDense`.
    """

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        batch, length, *joined = ops.shape(inputs)
        kernel, width = self.kernel, math.prod(joined)
        outputs = ops.reshape(inputs, (batch, length, width))
        outputs = ops.matmul(outputs, ops.reshape(kernel, (width, -1)))
        if self.bias is not None:
            outputs = add_bias(outputs, ops.reshape(self.bias, (-1,)))
        outputs = ops.reshape(outputs, (batch, length, *kernel.shape[len(joined) :]))
        return outputs if self.activation is None else self.activation(outputs)
