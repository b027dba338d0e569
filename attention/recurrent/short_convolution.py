"""Layers that look back over a few tokens."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import check_positive_int
from attention.contract.cached_layer import CachedLayer
from attention.contract.checks import check_sequence_shape
from attention.contract.initializers import clone_initializer
from attention.contract.padding import last_tokens


def _with_past(x: Any, padding_mask: Any, cache: Any, count: int) -> tuple[Any, Any]:
    """The last `count` tokens in front of the new ones, and the cache behind them."""
    past = ops.zeros_like(x[:, :1]) if cache is None else ops.cast(cache, x.dtype)
    if cache is None and count > 1:
        past = ops.repeat(past, count, axis=1)
    seen = ops.concatenate([past, x], axis=1)
    if cache is None:
        return seen, None
    return seen, ops.cast(last_tokens(seen, padding_mask, count), cache.dtype)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class TokenShift(CachedLayer):
    """Gives each token the one before it; the first gets zeros.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        padding_mask: boolean tensor `(batch, length)`: the real tokens.
        cache: a cache made by `create_cache`, one token for each row.
        cache_update_index: as for every `CachedLayer`; it makes no difference.

    Returns:
        A tensor of the shape of `x`; with a cache, `(outputs, cache)`.

    Example:

    >>> import numpy as np
    >>> from attention import TokenShift
    >>> np.array(TokenShift()(np.array([[[1.0], [2.0], [3.0]]])))[0, :, 0].tolist()
    [0.0, 1.0, 2.0]

    Reference:

    - [Peng et al., 2023](https://arxiv.org/abs/2305.13048)
    """

    def build(self, inputs_shape: tuple) -> None:
        check_sequence_shape(self.name, inputs_shape)
        self._width = inputs_shape[-1]

    def create_cache(self, batch_size: int, max_length: int) -> Any:
        self._require_built()
        batch_size = check_positive_int("batch_size", batch_size)
        return ops.zeros((batch_size, 1, self._width), self.compute_dtype)

    def _require_built(self) -> None:
        if not self.built:
            raise ValueError(
                f"Layer '{self.name}' does not know the width of its inputs yet, so "
                "its cache can't be sized. Call it once, or call `build` with the "
                "shape of its inputs, before `create_cache`."
            )

    def call(
        self,
        x: Any,
        padding_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
    ) -> Any:
        seen, new_cache = _with_past(x, padding_mask, cache, 1)
        outputs = seen[:, :-1]
        return outputs if cache is None else (outputs, new_cache)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class ShortConvolution(TokenShift):
    """A causal convolution over a few tokens, each channel by itself.

    Args:
        kernel_size: int. How many tokens a token sees, itself included.
        use_bias: bool. Whether there is a bias.
        activation: `None`, a name or a function.
        kernel_initializer: initializer of the kernel, `(kernel_size, width)`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments and results are those of `TokenShift`; the cache holds the last
    `kernel_size - 1` tokens.

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
        activation: Any = None,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kernel_size = check_positive_int("kernel_size", kernel_size)
        if kernel_size < 2:
            raise ValueError(
                "`kernel_size` must be at least 2: with 1 a token sees no other. "
                f"Received: kernel_size={kernel_size}"
            )
        self.use_bias = bool(use_bias)
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, inputs_shape: tuple) -> None:
        super().build(inputs_shape)
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

    def create_cache(self, batch_size: int, max_length: int) -> Any:
        self._require_built()
        batch_size = check_positive_int("batch_size", batch_size)
        shape = (batch_size, self.kernel_size - 1, self._width)
        return ops.zeros(shape, self.compute_dtype)

    def call(
        self,
        x: Any,
        padding_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
    ) -> Any:
        seen, new_cache = _with_past(x, padding_mask, cache, self.kernel_size - 1)
        kernel = ops.cast(self.kernel, x.dtype)
        length = ops.shape(x)[1]
        outputs = sum(
            seen[:, i : i + length] * kernel[i] for i in range(self.kernel_size)
        )
        if self.bias is not None:
            outputs = outputs + ops.cast(self.bias, x.dtype)
        outputs = self.activation(outputs)
        return outputs if cache is None else (outputs, new_cache)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            kernel_size=self.kernel_size,
            use_bias=self.use_bias,
            activation=keras.activations.serialize(self.activation),
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
        )
        return config
