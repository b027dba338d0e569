"""The base of recurrent mixers with heads."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract.arguments import (
    arguments_of,
    check_optional_positive_int,
    check_positive_int,
)
from attention.contract.composite_cached_layer import CompositeCachedLayer
from attention.contract.types import Initializer, Shape, Tensor
from attention.positions.position_scheme import PositionScheme
from attention.recurrent.linear_recurrence import LinearRecurrence
from attention.recurrent.short_convolution import ShortConvolution


class RecurrentMixer(CompositeCachedLayer):
    """A layer of heads around a `LinearRecurrence`.

    A subclass makes its projections and its recurrence in `build`, by the methods
    below and `make_dense`, and computes in `transform`.

    Args:
        num_heads: int. The number of heads.
        key_dim: int or `None`. The size of queries and keys; `None` means the width
            of the inputs divided by `num_heads`.
        kernel_initializer: initializer of the projections.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int | None = None,
        kernel_initializer: Initializer = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.key_dim = check_optional_positive_int("key_dim", key_dim)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def head_size(self, size: int, inputs_shape: Shape) -> int:
        """Returns `size` divided by the number of heads, or raises a `ValueError`."""
        if size % self.num_heads:
            raise ValueError(
                f"Layer '{self.name}' divides {size} channels among its heads, so "
                f"`num_heads` must divide them. Received: num_heads={self.num_heads}, "
                f"inputs of shape {tuple(inputs_shape)}. Pass the size of a head, "
                "or another `num_heads`."
            )
        return size // self.num_heads

    def make_recurrence(
        self,
        key_dim: int,
        value_dim: int | None = None,
        position: PositionScheme | None = None,
    ) -> LinearRecurrence:
        """Returns a built `LinearRecurrence` of all heads."""
        layer = LinearRecurrence(
            self.num_heads, key_dim, value_dim, position=position, name="recurrence"
        )
        layer.build((None, None, self.num_heads, key_dim))
        return layer

    def make_convolution(
        self, kernel_size: int, width: int, use_bias: bool = False
    ) -> ShortConvolution:
        """Returns a built `ShortConvolution` with SiLU."""
        layer = ShortConvolution(
            kernel_size,
            use_bias=use_bias,
            activation="silu",
            dtype=self.dtype_policy,
            name="convolution",
        )
        layer.build((None, None, width))
        return layer

    def add_float32_weight(
        self, name: str, shape: tuple[int, ...], initializer: Initializer
    ) -> Tensor:
        """Adds a weight of decays, biases and the like: float32 in every policy."""
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
        )

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(RecurrentMixer, self), **super().get_config()}
