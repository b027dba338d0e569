"""What recurrent mixers have in common: heads, projections and small weights."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import check_positive_int
from attention.contract.composite_cached_layer import CompositeCachedLayer
from attention.contract.initializers import clone_initializer


class RecurrentMixer(CompositeCachedLayer):
    """A layer of heads around a `LinearRecurrence`.

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
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = check_positive_int("num_heads", num_heads)
        if key_dim is not None:
            check_positive_int("key_dim", key_dim)
        self.key_dim = key_dim
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def _divide(self, size: int, inputs_shape: tuple) -> int:
        """The size of a head, or an error that says what does not fit."""
        if size % self.num_heads:
            raise ValueError(
                f"The heads of layer '{self.name}' share {size} numbers, which "
                f"`num_heads` must divide. Received: num_heads={self.num_heads}, "
                f"inputs of shape {tuple(inputs_shape)}. Pass the size of a head, "
                "or another `num_heads`."
            )
        return size // self.num_heads

    def _dense(
        self, name: str, size: int, inputs_shape: tuple, use_bias: bool = False
    ) -> keras.layers.Layer:
        return built_dense(self, name, size, inputs_shape, use_bias)

    def _head_norm(self, size: int, epsilon: float) -> keras.layers.Layer:
        """Makes a norm of each head by its root mean square."""
        norm = keras.layers.RMSNormalization(
            epsilon=epsilon, dtype=self.dtype_policy, name="head_norm"
        )
        norm.build((None, None, None, size))
        return norm

    def _small_weight(self, name: str, shape: tuple, initializer: Any) -> Any:
        """A weight of decays, biases and the like, float32 whatever the policy."""
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
        )

    def _heads(self, x: Any, heads: int) -> Any:
        """`(batch, length, heads * dim)` as `(batch, length, heads, dim)`."""
        return ops.reshape(x, (*ops.shape(x)[:2], heads, x.shape[-1] // heads))

    def _join_heads(self, x: Any) -> Any:
        """`(batch, length, heads, dim)` as `(batch, length, heads * dim)`."""
        return ops.reshape(x, (*ops.shape(x)[:2], x.shape[2] * x.shape[3]))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
        )
        return config


def built_dense(
    layer: Any, name: str, size: int, inputs_shape: tuple, use_bias: bool = False
) -> keras.layers.Layer:
    """Makes a projection with the initializer and the dtype policy of a layer."""
    dense = keras.layers.Dense(
        size,
        use_bias=use_bias,
        kernel_initializer=clone_initializer(layer.kernel_initializer),
        dtype=layer.dtype_policy,
        name=name,
    )
    dense.build(inputs_shape)
    return dense


def float32(x: Any) -> Any:
    """What decays and rates are computed in."""
    return ops.cast(x, "float32")


def unit_length(x: Any, epsilon: float = 1e-6) -> Any:
    """Vectors of length 1 along the last axis, in float32."""
    x = float32(x)
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + epsilon)


def repeat_heads(x: Any, times: int) -> Any:
    """Lets each of `(batch, length, groups, dim)` serve so many heads in a row."""
    return x if times == 1 else ops.repeat(x, times, axis=2)
