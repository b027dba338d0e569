"""Feed-forward layers, ready to be returned from `create_ffn`."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract import check_positive_int, clone_initializer


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
def gelu_approximate(x: Any) -> Any:
    """GELU by its tanh approximation, as GPT-2 was trained with.

    Args:
        x: tensor of any shape.

    Returns:
        A tensor of the same shape and dtype.
    """
    return keras.activations.gelu(x, approximate=True)


class _FeedForwardBase(keras.layers.Layer):
    """What both feed-forward layers share: the arguments and the projections."""

    def __init__(
        self,
        intermediate_dim: int,
        activation: Any,
        use_bias: bool,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.intermediate_dim = check_positive_int("intermediate_dim", intermediate_dim)
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.supports_masking = True

    def _project(self, name: str, units: int, inputs_shape: tuple) -> Any:
        dense = keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build(inputs_shape)
        return dense

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return tuple(inputs_shape)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            intermediate_dim=self.intermediate_dim,
            activation=keras.activations.serialize(self.activation),
            use_bias=self.use_bias,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            bias_initializer=keras.initializers.serialize(self.bias_initializer),
        )
        return config


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class FeedForward(_FeedForwardBase):
    """Two dense layers with an activation in between.

    Args:
        intermediate_dim: int. The width in between.
        activation: the activation. Defaults to `"gelu"`.
        use_bias: bool. Whether the dense layers have biases.
        kernel_initializer: initializer of the dense layers.
        bias_initializer: initializer of their biases.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(..., width)`.

    Returns:
        A tensor of the same shape, in the compute dtype.

    Raises:
        TypeError: if `intermediate_dim` is no integer.
        ValueError: if it is not positive.

    Example:

    >>> import numpy as np
    >>> from blocks import FeedForward
    >>> FeedForward(intermediate_dim=32)(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True

    Reference:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    def __init__(
        self,
        intermediate_dim: int,
        activation: Any = "gelu",
        use_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(intermediate_dim, activation, use_bias, **kwargs)

    def build(self, inputs_shape: tuple) -> None:
        self.intermediate_dense = self._project(
            "intermediate", self.intermediate_dim, inputs_shape
        )
        self.output_dense = self._project(
            "output", inputs_shape[-1], (*inputs_shape[:-1], self.intermediate_dim)
        )

    def call(self, x: Any) -> Any:
        return self.output_dense(self.activation(self.intermediate_dense(x)))


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class GatedFeedForward(_FeedForwardBase):
    """A feed-forward layer with a gate: SwiGLU, GeGLU.

    Computes `output(activation(gate(x)) * intermediate(x))`.

    Args:
        intermediate_dim: int. The width in between.
        activation: the activation of the gate: `"silu"` (the default) makes it
            SwiGLU, as in Llama, `"gelu"` makes it GeGLU.
        use_bias: bool. Whether the dense layers have biases.
        kernel_initializer: initializer of the dense layers.
        bias_initializer: initializer of their biases.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(..., width)`.

    Returns:
        A tensor of the same shape, in the compute dtype.

    Raises:
        TypeError: if `intermediate_dim` is no integer.
        ValueError: if it is not positive.

    Example:

    >>> import numpy as np
    >>> from blocks import GatedFeedForward
    >>> ffn = GatedFeedForward(intermediate_dim=32)
    >>> ffn(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True

    Reference:

    - [Shazeer, 2020](https://arxiv.org/abs/2002.05202)
    """

    def __init__(
        self,
        intermediate_dim: int,
        activation: Any = "silu",
        use_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(intermediate_dim, activation, use_bias, **kwargs)

    def build(self, inputs_shape: tuple) -> None:
        width = self.intermediate_dim
        self.gate_dense = self._project("gate", width, inputs_shape)
        self.intermediate_dense = self._project("intermediate", width, inputs_shape)
        self.output_dense = self._project(
            "output", inputs_shape[-1], (*inputs_shape[:-1], width)
        )

    def call(self, x: Any) -> Any:
        gate = self.activation(self.gate_dense(x))
        return self.output_dense(ops.multiply(gate, self.intermediate_dense(x)))
