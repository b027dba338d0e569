"""Normalization layers that Keras does not have, ready for `create_norm`."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class DynamicTanh(keras.layers.Layer):
    """Computes `scale * tanh(alpha * x) + bias`, a norm without statistics.

    Besides it, `create_norm` may return Keras's `LayerNormalization` (with
    `center=False` it has no bias), `RMSNormalization`, or `Identity` for none.

    Args:
        alpha_init: float. The initial value of `alpha`, one trainable number.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(..., width)`.

    Returns:
        A tensor of the same shape.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from blocks import DynamicTanh
    >>> ops.convert_to_numpy(DynamicTanh()(np.array([[0.0, 100.0]]))).tolist()
    [[0.0, 1.0]]

    Reference:

    - [Zhu et al., 2025](https://arxiv.org/abs/2503.10622)
    """

    def __init__(self, alpha_init: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha_init = float(alpha_init)
        self.supports_masking = True

    def build(self, inputs_shape: Shape) -> None:
        width = inputs_shape[-1]
        alpha = keras.initializers.Constant(self.alpha_init)
        self.alpha = self.add_weight(name="alpha", shape=(), initializer=alpha)
        self.scale = self.add_weight(name="scale", shape=(width,), initializer="ones")
        self.bias = self.add_weight(name="bias", shape=(width,), initializer="zeros")

    def call(self, x: Tensor) -> Tensor:
        alpha, scale, bias = (
            ops.cast(w, x.dtype) for w in (self.alpha, self.scale, self.bias)
        )
        return scale * ops.tanh(alpha * x) + bias

    def compute_output_shape(self, inputs_shape: Shape) -> Shape:
        return tuple(inputs_shape)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["alpha_init"] = self.alpha_init
        return config


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class ZeroCenteredRMSNormalization(keras.layers.Layer):
    """Divides by the root mean square and multiplies by `1 + scale`, as in Gemma.

    All is computed in float32: a scale that is stored in bfloat16 has more digits than
    its sum with 1.

    Args:
        epsilon: float. Added to the mean square.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(..., width)`.

    Returns:
        A tensor of the same shape.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from blocks.layers.norms import ZeroCenteredRMSNormalization
    >>> norm = ZeroCenteredRMSNormalization()
    >>> ops.convert_to_numpy(norm(np.array([[3.0, -3.0]]))).round(3).tolist()
    [[1.0, -1.0]]

    References:

    - [Zhang et al., 2019](https://arxiv.org/abs/1910.07467)
    - [Gemma, 2024](https://arxiv.org/abs/2403.08295)
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.supports_masking = True

    def build(self, inputs_shape: Shape) -> None:
        self.scale = self.add_weight(
            (inputs_shape[-1],), "zeros", name="scale", autocast=False
        )

    def call(self, x: Tensor) -> Tensor:
        scale = 1 + ops.cast(self.scale, "float32")
        y = ops.rms_normalization(ops.cast(x, "float32"), epsilon=self.epsilon)
        return ops.cast(y * scale, x.dtype)

    def compute_output_shape(self, inputs_shape: Shape) -> Shape:
        return tuple(inputs_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}
