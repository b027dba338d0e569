"""Gated delta networks, the recurrent mixer of Qwen3-Next."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import check_positive_int
from attention.contract.checks import check_sequence_shape
from attention.recurrent.linear_recurrence import LinearRecurrence
from attention.recurrent.recurrent_mixer import (
    RecurrentMixer,
    float32,
    repeat_heads,
    unit_length,
)
from attention.recurrent.short_convolution import ShortConvolution


def log_of_uniform(low: float, high: float) -> Any:
    """An initializer: the logarithm of numbers drawn between two others."""

    def initialize(shape: tuple, dtype: Any = None) -> Any:
        return ops.log(keras.random.uniform(shape, low, high, dtype=dtype))

    return initialize


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class GatedDeltaNet(RecurrentMixer):
    """A state that decays, and in which a key's value is replaced by a new one.

    ```
    x ─► query, key, value ─► convolution ─► unit length ─► state ─► query · state ─► norm ─┐
      └► beta, decay ──────────────────────────────────────┘                                │
      └► gate ─► silu ────────────────────────────────────────────────────────────────────► × ─► output

    state = decay * state
    state = state + key * beta * (value - key · state)
    ```

    Args:
        num_heads: int. The number of value heads, each with a state.
        num_key_heads: int or `None`. The number of query and key heads; divides
            `num_heads`; `None` means as many.
        key_dim: int or `None`. The size of query and key heads; `None` means the
            width of the inputs divided by `num_heads`.
        value_dim: int or `None`. The size of value heads; `None` means `key_dim`.
        kernel_size: int. How many tokens the convolution sees.
        epsilon: float. Of the norm of each head.
        kernel_initializer: initializer of the projections.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments and results are those of `Retention`.

    Raises:
        ValueError: if numbers of heads, or the width of the inputs, do not divide.

    Example:

    >>> import numpy as np
    >>> from attention import GatedDeltaNet
    >>> layer = GatedDeltaNet(num_heads=4, num_key_heads=2)
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True

    References:

    - [Yang et al., 2024](https://arxiv.org/abs/2412.06464)
    - [Yang et al., 2024](https://arxiv.org/abs/2406.06484) (computed in chunks)
    """

    def __init__(
        self,
        num_heads: int,
        num_key_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        kernel_size: int = 4,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, **kwargs)
        if num_key_heads is not None:
            check_positive_int("num_key_heads", num_key_heads)
            if num_heads % num_key_heads:
                raise ValueError(
                    "`num_heads` must be divisible by `num_key_heads`. Received: "
                    f"num_heads={num_heads}, num_key_heads={num_key_heads}"
                )
        if value_dim is not None:
            check_positive_int("value_dim", value_dim)
        self.num_key_heads, self.value_dim = num_key_heads, value_dim
        self.kernel_size, self.epsilon = kernel_size, epsilon

    def build(self, inputs_shape: tuple) -> None:
        check_sequence_shape(self.name, inputs_shape)
        width, heads = inputs_shape[-1], self.num_heads
        self._key_heads = self.num_key_heads or heads
        key_dim = self.key_dim or self._divide(width, inputs_shape)
        value_dim = self.value_dim or key_dim
        self._sizes = (self._key_heads * key_dim, heads * value_dim)
        keys, values = self._sizes
        self.query_key_value = self._dense(
            "query_key_value", 2 * keys + values, inputs_shape
        )
        self.convolution = ShortConvolution(
            self.kernel_size,
            activation="silu",
            dtype=self.dtype_policy,
            name="convolution",
        )
        self.convolution.build((*inputs_shape[:-1], 2 * keys + values))
        self.gate_dense = self._dense("gate", values, inputs_shape)
        self.beta_dense = self._dense("beta", heads, inputs_shape)
        self.decay_dense = self._dense("decay", heads, inputs_shape)
        self.log_rate = self._small_weight(
            "log_rate", (heads,), log_of_uniform(0.01, 16)
        )
        self.decay_bias = self._small_weight("decay_bias", (heads,), "ones")
        self.recurrence = LinearRecurrence(heads, key_dim, value_dim, name="recurrence")
        self.recurrence.build((None, None, heads, key_dim))
        self.head_norm = self._head_norm(value_dim, self.epsilon)
        inner = (*inputs_shape[:-1], values)
        self.output_dense = self._dense("output", width, inner)
        self._scale = key_dim**-0.5

    def transform(self, x: Any, padding_mask: Any = None, training: Any = None) -> Any:
        keys, _ = self._sizes
        mixed = self.convolution(self.query_key_value(x))
        query, key, value = ops.split(mixed, [keys, 2 * keys], axis=-1)
        times = self.num_heads // self._key_heads
        query, key = (
            repeat_heads(unit_length(self._heads(y, self._key_heads)), times)
            for y in (query, key)
        )
        value = float32(self._heads(value, self.num_heads))
        beta = ops.sigmoid(float32(self.beta_dense(x)))[..., None]
        rate = ops.softplus(float32(self.decay_dense(x)) + self.decay_bias)
        log_decay = (-ops.exp(self.log_rate) * rate)[..., None]
        found = self.recurrence(
            query * self._scale,
            key,
            beta * value,
            log_decay,
            # What the decayed state has for this key is taken away.
            remove=-beta * ops.exp(log_decay) * key,
            replace=key,
        )
        found = self.head_norm(ops.cast(found, self.compute_dtype))
        gate = ops.silu(self.gate_dense(x))
        return self.output_dense(self._join_heads(found) * gate)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_key_heads=self.num_key_heads,
            value_dim=self.value_dim,
            kernel_size=self.kernel_size,
            epsilon=self.epsilon,
        )
        return config
