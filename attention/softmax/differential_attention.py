"""Attention as the difference of two softmaxes."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import arguments_of, check_number
from attention.contract.inner_layers import make_rms_norm
from attention.contract.roles import declare_axes
from attention.contract.types import Tensor
from attention.softmax.grouped_query_attention import GroupedQueryAttention


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class DifferentialAttention(GroupedQueryAttention):
    """Attention whose weights are the difference of two softmaxes.

    ```
    query ─► q1, q2 ─┐
    value ─► k1, k2 ─┴► softmax(q1·k1) - lambda * softmax(q2·k2) ─► × ─► norm ─► output_dense
           └► v ──────────────────────────────────────────────────► ┘
    ```

    Noise that both softmaxes have in common cancels out. Each head has two query and
    two key heads and a value head of twice their size; its output is normalized by the
    root mean square. `lambda = exp(q_1·k_1) - exp(q_2·k_2) + lambda_init` is
    trained, one for all heads of a layer.

    Args:
        num_heads: int. The number of heads, pairs of softmaxes.
        num_key_value_heads: int or `None`. How many heads have keys and values of
            their own; divides `num_heads`. `None` means `num_heads`.
        key_dim: int or `None`. The size of each of the two query and key heads;
            `None` means the width of the inputs divided by `2 * num_heads`.
        value_dim: int or `None`. The size of each value head; `None`: `2 * key_dim`.
        lambda_init: float. The initial lambda. In the paper it grows with the depth
            `i`, counted from 0: `0.8 - 0.6 * exp(-0.3 * i)`.
        **kwargs: as for `GroupedQueryAttention`, such as `position` and `window`.

    Call arguments and results are those of `GroupedQueryAttention`; scores are
    differences, and may be negative.

    Raises:
        TypeError: if `lambda_init` is not a number.
        ValueError: if the width of the inputs does not fit the heads.

    Example:

    >>> import numpy as np
    >>> from attention import DifferentialAttention, RotaryPosition
    >>> layer = DifferentialAttention(num_heads=2, position=RotaryPosition())
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True

    Reference:

    - [Ye et al., 2024](https://arxiv.org/abs/2410.05258)
    """

    lambda_init: Any
    _per_head = 2

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        lambda_init: float = 0.8,
        **kwargs: Any,
    ) -> None:
        if num_key_value_heads is None:
            num_key_value_heads = num_heads
        super().__init__(num_heads, num_key_value_heads, key_dim, value_dim, **kwargs)
        self.lambda_init = check_number("lambda_init", lambda_init)

    def build(
        self,
        query_shape: tuple,
        value_shape: tuple | None = None,
        key_shape: tuple | None = None,
    ) -> None:
        super().build(query_shape, value_shape, key_shape)
        # Float32, as the softmax.
        self.lambdas = self.add_weight(
            (2, 2, self.query_heads()[1]),
            keras.initializers.RandomNormal(stddev=0.1),
            dtype="float32",
            autocast=False,
            name="lambdas",
        )
        declare_axes(self, {"lambdas": (None, None, None)})
        self.head_norm = make_rms_norm(self, "head_norm", self.head_dims()[1], 1e-5)

    def _half_dim(self) -> int:
        return self.key_dim or self._width // (2 * self.num_heads)

    def head_dims(self) -> tuple[int, int]:
        # The two keys of a head are one key of twice the size.
        return 2 * self._half_dim(), self.value_dim or 2 * self._half_dim()

    def query_heads(self) -> tuple[int, int]:
        return 2 * self.num_heads, self._half_dim()

    def key_heads(self) -> tuple[int, int]:
        return 2 * self.num_key_value_heads, self._half_dim()

    def arrange_heads(
        self, query: Tensor, new: dict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # The two queries of a head, each for one half of its keys.
        rows, length = ops.shape(query)[:2]
        heads, dim = query.shape[2:]
        halves = ops.reshape(ops.eye(2, dtype=query.dtype), (2, 2, 1))
        # (batch, length, num_heads, 2, 1, dim), where one half of the last two is zero.
        query = ops.reshape(query, (rows, length, self.num_heads, 2, 1, dim)) * halves
        query = ops.reshape(query, (rows, length, heads, 2 * dim))
        key = new["key"]
        shape = (*ops.shape(key)[:2], self.num_key_value_heads, 2 * dim)
        return query, {**new, "key": ops.reshape(key, shape)}

    def combine_heads(self, outputs: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        # Subtracts the second of each pair, and normalizes the difference.
        products = ops.exp(ops.sum(self.lambdas[:, 0] * self.lambdas[:, 1], axis=-1))
        weight = products[0] - products[1] + self.lambda_init

        def difference(x: Tensor, axis: int) -> Tensor:
            shape = list(ops.shape(x))
            shape[axis : axis + 1] = [self.num_heads, 2]
            both = ops.reshape(ops.cast(x, "float32"), shape)
            first, second = ops.split(both, 2, axis=axis + 1)
            return ops.squeeze(first - weight * second, axis=axis + 1)

        # (batch, length, num_heads, value_dim)
        outputs = ops.cast(difference(outputs, 2), outputs.dtype)
        outputs = self.head_norm(outputs) * (1 - self.lambda_init)
        return outputs, None if scores is None else difference(scores, 1)

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(DifferentialAttention, self), **super().get_config()}
