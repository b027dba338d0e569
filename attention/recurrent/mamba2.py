"""Mamba-2, a state space mixer."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from attention.contract.arguments import (
    arguments_of,
    check_positive_int,
    refuse_arguments,
)
from attention.contract.checks import check_sequence_shape
from attention.contract.inner_layers import make_dense
from attention.contract.types import DType, Shape, Tensor
from attention.recurrent.heads import (
    float32,
    gate_heads,
    join_heads,
    repeat_heads,
    split_heads,
)
from attention.recurrent.recurrent_mixer import RecurrentMixer


def _log_of_heads(shape: tuple[int, ...], dtype: DType = None) -> Tensor:
    """Returns logarithms of the rates 1, 2, 3 and so on: one for each head."""
    return ops.log(ops.cast(ops.arange(1, shape[0] + 1), dtype or "float32"))


def _inverse_softplus_of_steps(shape: tuple[int, ...], dtype: DType = None) -> Tensor:
    """Returns biases whose softplus is log-uniform between 0.001 and 0.1."""
    low, high = math.log(1e-3), math.log(1e-1)
    steps = ops.exp(keras.initializers.RandomUniform(low, high)(shape, dtype))
    return steps + ops.log(-ops.expm1(-steps))


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Mamba2(RecurrentMixer):
    """The state space duality layer of Mamba-2.

    ```
    x ─► input ─┬► convolution ─┬► value ──────┐
                │               └► key, query ─┴► state ─► query · state + skip * value ─► × ─► norm ─► output
                ├► step ─► softplus ────────────┘                                          │
                └► gate ─► silu ───────────────────────────────────────────────────────────┘

    state = exp(-rate * step) * state + key * step * value
    ```

    Args:
        num_heads: int. The number of heads, each with a state.
        state_dim: int. The size of queries and keys, which the heads of a group
            share. They are the paper's C and B, of size N.
        expand: int. The inner width divided by the width of the inputs.
        num_groups: int. How many queries and keys there are; divides `num_heads`.
        kernel_size: int. How many tokens the convolution sees.
        use_bias: bool. Whether the input and output projections have biases.
        epsilon: float. Of the norm.
        convolution_bias: bool. Whether the convolution has a bias.
        step_limit: pair of numbers or `None`. The least and the largest step; `None`
            means that steps have no limits.
        **kwargs: `kernel_initializer`, and arguments of `keras.layers.Layer`.

    Call arguments and results are those of `Retention`.

    Raises:
        ValueError: if numbers of heads or groups, or the inner width, do not divide.

    Example:

    >>> import numpy as np
    >>> from attention import Mamba2
    >>> layer = Mamba2(num_heads=4, state_dim=8)
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True

    Reference:

    - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
    """

    def __init__(
        self,
        num_heads: int,
        state_dim: int = 128,
        expand: int = 2,
        num_groups: int = 1,
        kernel_size: int = 4,
        use_bias: bool = False,
        epsilon: float = 1e-5,
        convolution_bias: bool = True,
        step_limit: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_arguments(self, kwargs, key_dim="it is called `state_dim` here")
        super().__init__(num_heads, **kwargs)
        self.state_dim = check_positive_int("state_dim", state_dim)
        self.expand = check_positive_int("expand", expand)
        self.num_groups = check_positive_int("num_groups", num_groups)
        if num_heads % num_groups:
            raise ValueError(
                "`num_heads` must be divisible by `num_groups`. Received: "
                f"num_heads={num_heads}, num_groups={num_groups}"
            )
        self.kernel_size = kernel_size
        self.use_bias, self.epsilon = bool(use_bias), epsilon
        self.convolution_bias = bool(convolution_bias)
        self.step_limit = None if step_limit is None else list(step_limit)

    def build(self, inputs_shape: Shape) -> None:
        width = check_sequence_shape(self.name, inputs_shape)
        heads = self.num_heads
        inner = self.expand * width
        value_dim = self.head_size(inner, inputs_shape)
        states = self.num_groups * self.state_dim
        self._sizes = (inner, states)
        convolved = inner + 2 * states
        self.input_dense = make_dense(
            self, "input", inner + convolved + heads, width, self.use_bias
        )
        self.convolution = self.make_convolution(
            self.kernel_size, convolved, self.convolution_bias
        )
        self.log_rate = self.add_float32_weight("log_rate", (heads,), _log_of_heads)
        self.step_bias = self.add_float32_weight(
            "step_bias", (heads,), _inverse_softplus_of_steps
        )
        self.skip = self.add_float32_weight("skip", (heads,), "ones")
        self.recurrence = self.make_recurrence(self.state_dim, value_dim)
        self.norm_scale = self.add_float32_weight("norm_scale", (inner,), "ones")
        self.output_dense = make_dense(self, "output", width, inner, self.use_bias)

    def transform(self, x: Tensor) -> Tensor:  # type: ignore[override]
        inner, states = self._sizes  # h * v, g * k
        # (b, l, h * v), (b, l, h * v + 2 g * k), (b, l, h)
        gate, mixed, step = ops.split(
            self.input_dense(x), [inner, 2 * inner + 2 * states], axis=-1
        )
        mixed = self.convolution(mixed)
        value, key, query = ops.split(mixed, [inner, inner + states], axis=-1)
        value = float32(split_heads(value, self.num_heads))  # (b, l, h, v)
        times = self.num_heads // self.num_groups
        # (b, l, g * k) -> (b, l, h, k)
        key, query = (
            repeat_heads(float32(split_heads(y, self.num_groups)), times)
            for y in (key, query)
        )
        step = ops.softplus(float32(step) + self.step_bias)[..., None]  # (b, l, h, 1)
        if self.step_limit is not None:
            step = ops.clip(step, *self.step_limit)
        log_decay = -ops.exp(self.log_rate)[:, None] * step
        heads = self.recurrence(query, key, step * value, log_decay)  # (b, l, h, v)
        heads = heads + self.skip[:, None] * value
        outputs = gate_heads(heads, gate)  # (b, l, h * v)
        # An RMS norm of each group: (b, l, g, h / g * v).
        groups = split_heads(outputs, self.num_groups)
        mean = ops.mean(ops.square(groups), axis=-1, keepdims=True)
        outputs = join_heads(groups * ops.rsqrt(mean + self.epsilon))
        outputs = ops.cast(outputs * self.norm_scale, self.compute_dtype)
        return self.output_dense(outputs)  # (b, l, w)

    def get_config(self) -> dict[str, Any]:
        config = {**arguments_of(Mamba2, self), **super().get_config()}
        del config["key_dim"]  # its name here is `state_dim`
        return config
