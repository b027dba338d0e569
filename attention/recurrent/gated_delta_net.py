"""Gated delta networks, the recurrent mixer of Qwen3-Next."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import arguments_of, check_optional_positive_int
from attention.contract.checks import check_sequence_shape
from attention.contract.inner_layers import make_dense, make_rms_norm
from attention.contract.types import DType, Shape, Tensor
from attention.recurrent.heads import (
    float32,
    gate_heads,
    repeat_heads,
    split_heads,
    unit_length,
)
from attention.recurrent.recurrent_mixer import RecurrentMixer


def _log_of_uniform(shape: tuple[int, ...], dtype: DType = None) -> Tensor:
    """Returns logarithms of numbers drawn between 0.01 and 16."""
    return ops.log(keras.initializers.RandomUniform(0.01, 16)(shape, dtype))


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class GatedDeltaNet(RecurrentMixer):
    """A state that decays, and in which a new value replaces that of its key.

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
        **kwargs: `kernel_initializer`, and arguments of `keras.layers.Layer`.

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
        num_key_heads = check_optional_positive_int("num_key_heads", num_key_heads)
        if num_heads % (num_key_heads or 1):
            raise ValueError(
                "`num_heads` must be divisible by `num_key_heads`. Received: "
                f"num_heads={num_heads}, num_key_heads={num_key_heads}"
            )
        self.num_key_heads = num_key_heads
        self.value_dim = check_optional_positive_int("value_dim", value_dim)
        self.kernel_size, self.epsilon = kernel_size, epsilon

    def build(self, inputs_shape: Shape) -> None:
        width = check_sequence_shape(self.name, inputs_shape)
        heads = self.num_heads
        self._key_heads = self.num_key_heads or heads
        key_dim = self.key_dim or self.head_size(width, inputs_shape)
        value_dim = self.value_dim or key_dim
        self._key_size = keys = self._key_heads * key_dim
        values = heads * value_dim
        self.query_key_value = make_dense(
            self, "query_key_value", 2 * keys + values, width, role="input"
        )
        self.convolution = self.make_convolution(self.kernel_size, 2 * keys + values)
        self.gate_dense = make_dense(self, "gate", values, width)
        heads_last = (None, "heads")
        self.beta_dense = make_dense(self, "beta", heads, width, axes=heads_last)
        self.decay_dense = make_dense(self, "decay", heads, width, axes=heads_last)
        self.log_rate = self.add_float32_weight("log_rate", (heads,), _log_of_uniform)
        self.decay_bias = self.add_float32_weight("decay_bias", (heads,), "ones")
        self.recurrence = self.make_recurrence(key_dim, value_dim)
        # As for `gate_heads`.
        self.head_norm = make_rms_norm(
            self, "head_norm", value_dim, self.epsilon, dtype="float32"
        )
        self.output_dense = make_dense(self, "output", width, values)
        self._scale = key_dim**-0.5

    def transform(self, x: Tensor) -> Tensor:  # type: ignore[override]
        mixed = self.convolution(self.query_key_value(x))  # (b, l, 2 g * k + h * v)
        query, key, value = ops.split(
            mixed, [self._key_size, 2 * self._key_size], axis=-1
        )
        times = self.num_heads // self._key_heads
        # (b, l, g * k) -> (b, l, h, k)
        query, key = (
            repeat_heads(unit_length(split_heads(y, self._key_heads)), times)
            for y in (query, key)
        )
        value = float32(split_heads(value, self.num_heads))  # (b, l, h, v)
        beta = ops.sigmoid(float32(self.beta_dense(x)))[..., None]  # (b, l, h, 1)
        rate = ops.softplus(float32(self.decay_dense(x)) + self.decay_bias)
        log_decay = (-ops.exp(self.log_rate) * rate)[..., None]  # (b, l, h, 1)
        heads = self.recurrence(
            query * self._scale,
            key,
            beta * value,
            log_decay,
            # Takes away the value that the decayed state has for this key.
            remove=-beta * ops.exp(log_decay) * key,
            replace=key,
        )
        outputs = gate_heads(self.head_norm(heads), self.gate_dense(x))  # (b, l, h * v)
        return self.output_dense(ops.cast(outputs, self.compute_dtype))  # (b, l, w)

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(GatedDeltaNet, self), **super().get_config()}
