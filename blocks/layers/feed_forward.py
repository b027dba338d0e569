"""Feed-forward layers, ready to be returned from `create_ffn`."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from attention.contract import (
    Activation,
    Dense,
    Initializer,
    Shape,
    Tensor,
    check_positive_int,
    clone_initializer,
    declare_role,
)

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = _LINEAR * 0.044715
_ROLES = {"intermediate": "ffn_input", "gate": "ffn_gate", "output": "ffn_output"}


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
def gelu_approximate(x: Tensor) -> Tensor:
    """Computes GELU by its tanh approximation.

    GPT-2, BLOOM, Gemma and T5 1.1 were trained with it; `transformers` calls it
    `"gelu_new"` or `"gelu_pytorch_tanh"`. The exact GELU, Keras's `"gelu"`, differs
    from it by up to 0.0005.

    Args:
        x: tensor of any shape.

    Returns:
        A tensor of the same shape and dtype.
    """
    if keras.config.backend() != "tensorflow" or isinstance(x, keras.KerasTensor):
        return keras.activations.gelu(x, approximate=True)

    # The same formula, `x * sigmoid(2 * u)` for `x * (1 + tanh(u)) / 2`, with fewer passes
    # over memory, and only `x` is kept for the gradient.
    @ops.custom_gradient
    def with_gradient(x: Tensor) -> Any:
        square = ops.square(x)
        outputs = x * ops.sigmoid(x * (_CUBIC * square + _LINEAR))

        def gradient(*arguments: Tensor, upstream: Any = None) -> Tensor:
            given = arguments[0] if upstream is None else upstream
            # Beyond it is 0 or 1, but squares overflow in float16.
            near = ops.clip(x, -10, 10)
            square = ops.square(near)
            part = ops.sigmoid(near * (_CUBIC * square + _LINEAR))
            slope = near * part * (1 - part) * (3 * _CUBIC * square + _LINEAR)
            return given * (part + slope)

        return outputs, gradient

    return with_gradient(x)


def published_activation(name: str) -> Activation:
    """Returns the activation that published configurations call by a name.

    Args:
        name: str. A name as in transformers, such as `"gelu_new"`; those that Keras has,
            too, mean the same there.

    Raises:
        ValueError: if there is no activation of this name.

    Example:

    >>> from blocks.layers.feed_forward import published_activation
    >>> published_activation("gelu_new").__name__
    'gelu_approximate'
    """
    return keras.activations.get(_PUBLISHED_ACTIVATIONS.get(name, name))


_PUBLISHED_ACTIVATIONS: dict[str, Activation] = dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_approximate
)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class FeedForward(keras.layers.Layer):
    """Two dense layers with an activation in between.

    Args:
        intermediate_dim: int. The width in between.
        activation: the activation. `"gelu"` (the default) is the exact GELU, as in
            GPT-NeoX; `blocks.gelu_approximate` is that of GPT-2.
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
        activation: Activation = "gelu",
        use_bias: bool = True,
        kernel_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.intermediate_dim = check_positive_int("intermediate_dim", intermediate_dim)
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.supports_masking = True

    def _project(self, name: str, units: int | None, inputs_shape: Shape) -> Any:
        dense = Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build(inputs_shape)
        return declare_role(dense, _ROLES[name])

    def build(self, inputs_shape: Shape) -> None:
        self.intermediate_dense = self._project(
            "intermediate", self.intermediate_dim, inputs_shape
        )
        self.output_dense = self._project(
            "output", inputs_shape[-1], (*inputs_shape[:-1], self.intermediate_dim)
        )

    def call(self, x: Tensor) -> Tensor:
        inner = self.activation(self.intermediate_dense(x))  # (..., intermediate_dim)
        return self.output_dense(inner)  # (..., width)

    def compute_output_shape(self, inputs_shape: Shape) -> Shape:
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
class GatedFeedForward(FeedForward):
    """A feed-forward layer with a gate: SwiGLU, GeGLU.

    Computes `output(activation(gate(x)) * intermediate(x))`.

    Args:
        intermediate_dim: int. The width in between.
        activation: the activation of the gate. `"silu"` (the default) makes it
            SwiGLU, as in Llama. `blocks.gelu_approximate` makes it GeGLU as in Gemma
            and T5 1.1, which were trained with GELU's tanh approximation; `"gelu"`
            makes it GeGLU with the exact GELU, as in ModernBERT. With the wrong one
            of the two, logits are about 0.01 off, and nothing else tells.
        use_bias: bool. Whether the dense layers have biases.
        **kwargs: the other arguments of `FeedForward`, which also says what it takes,
            returns and raises.

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
        activation: Activation = "silu",
        use_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(intermediate_dim, activation, use_bias, **kwargs)

    def build(self, inputs_shape: Shape) -> None:
        self.gate_dense = self._project("gate", self.intermediate_dim, inputs_shape)
        super().build(inputs_shape)

    def call(self, x: Tensor) -> Tensor:
        gate = self.activation(self.gate_dense(x))  # (..., intermediate_dim)
        inner = ops.multiply(gate, self.intermediate_dense(x))
        return self.output_dense(inner)  # (..., width)
