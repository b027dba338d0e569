"""A short causal convolution, as recurrent mixers have before their state."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import arguments_of, check_positive_int
from attention.contract.inner_layers import clone_initializer
from attention.contract.roles import declare_axes
from attention.contract.types import Activation, Initializer, Shape, Tensor
from attention.recurrent.heads import float32
from attention.recurrent.token_shift import TokenShift


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class ShortConvolution(TokenShift):
    """A causal depthwise convolution over a few tokens.

    Args:
        kernel_size: int. How many tokens a token sees, itself included.
        use_bias: bool. Whether there is a bias.
        activation: `None`, a name or a function.
        kernel_initializer: initializer of the kernel, of shape `(kernel_size, width)`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments and results are those of `TokenShift`, for `kernel_size - 1` tokens.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from attention import ShortConvolution
    >>> layer = ShortConvolution(3, kernel_initializer="ones")
    >>> ops.convert_to_numpy(layer(np.ones((1, 4, 1))))[0, :, 0].tolist()
    [1.0, 2.0, 3.0, 3.0]
    """

    def __init__(
        self,
        kernel_size: int = 4,
        use_bias: bool = False,
        activation: Activation = None,
        kernel_initializer: Initializer = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kernel_size = check_positive_int("kernel_size", kernel_size)
        if kernel_size < 2:
            raise ValueError(
                "`kernel_size` must be at least 2: with 1 a token sees no other. "
                f"Received: kernel_size={kernel_size}"
            )
        self._past = self.kernel_size - 1
        self.use_bias = bool(use_bias)
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, inputs_shape: Shape) -> None:
        super().build(inputs_shape)
        declare_axes(self, {"kernel": (None, None)})
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.kernel_size, self._width),
            initializer=clone_initializer(self.kernel_initializer),
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias", shape=(self._width,), initializer="zeros"
            )

    def _mix(self, seen: list[Tensor]) -> Tensor:
        # Each sum would be rounded in half precision.
        kernel = float32(self.kernel)
        # (b, l, w) * (w,)
        outputs = sum(float32(x) * kernel[i] for i, x in enumerate(seen))
        if self.bias is not None:
            outputs = outputs + float32(self.bias)
        return ops.cast(self.activation(outputs), seen[0].dtype)

    def get_config(self) -> dict[str, Any]:
        config = {**arguments_of(ShortConvolution, self), **super().get_config()}
        return {**config, "activation": keras.activations.serialize(self.activation)}
