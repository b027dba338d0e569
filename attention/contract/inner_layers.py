"""The layers within a layer: finding them, and making those that many have."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.roles import ROLES, Names, declare_axes, declare_role
from attention.contract.types import DType, Initializer, Tensor


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer or model and the layers within it, each once.

    Keras lists the layers of a model, but not those of a layer. They are found in its
    attributes: also in lists, tuples (named ones, too) and dicts.
    """
    found: dict[int, keras.layers.Layer] = {}
    waiting: list[Any] = [layer]
    while waiting:
        value = waiting.pop()
        if isinstance(value, keras.layers.Layer):
            if id(value) not in found:
                found[id(value)] = value
                waiting.extend(vars(value).values())
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
    return list(found.values())


def clone_initializer(initializer: Initializer, number: int = 0) -> Initializer:
    """Returns an initializer of the same configuration.

    Each use of an initializer draws the same numbers; weights that differ need copies.

    Args:
        initializer: a `keras.initializers.Initializer`, or any other callable,
            which is returned as it is.
        number: int. Added to the seed if that is an int: other numbers, other values.
    """
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if isinstance(config.get("seed"), int):
        config["seed"] += number
    return type(initializer).from_config(config)


def add_bias(product: Tensor, bias: Tensor) -> Tensor:
    """Returns a matrix product plus a bias.

    It is the same number as `product + bias`. But in a loop, XLA on TensorFlow fuses that
    sum with the product of a single token, which then takes half as long again, or seven
    times as long where the matrix is transposed.
    """
    return ops.subtract(product, ops.negative(bias))


class Quantizable:
    """Lets a subclass of a layer of Keras be quantized as that layer is."""

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        # Keras takes its own class only, unless it is told not to look.
        super().quantize(mode, type_check=False, config=config)  # type: ignore[misc]


class Dense(Quantizable, keras.layers.Dense):
    """Keras's dense layer, with a bias that does not slow down a single token."""

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if self.bias is None:
            return super().call(inputs, training=training)
        outputs = add_bias(ops.matmul(inputs, self.kernel), self.bias)
        return outputs if self.activation is None else self.activation(outputs)


def make_dense(
    layer: Any,
    name: str,
    size: int,
    input_size: int,
    use_bias: bool = False,
    role: str | None = None,
    axes: Names | None = None,
) -> keras.layers.Layer:
    """Returns a built projection with the initializers and dtype policy of `layer`.

    `role` is one of `declare_role`; `None` means the name, if that is one. `axes` are
    those of the kernel for `declare_axes`, where the role does not say them. Where
    `layer` has heads, an axis of heads holds so many.
    """
    bias_initializer = getattr(layer, "bias_initializer", "zeros")
    dense = Dense(
        size,
        use_bias=use_bias,
        kernel_initializer=clone_initializer(layer.kernel_initializer),
        bias_initializer=clone_initializer(bias_initializer),
        dtype=layer.dtype_policy,
        name=name,
    )
    dense.build((None, None, input_size))
    declared = {} if axes is None else {"kernel": axes, "bias": axes[1:]}
    declare_axes(dense, declared, getattr(layer, "num_heads", None))
    role = name if role is None and name in ROLES else role
    return dense if role is None else declare_role(dense, role)


def make_rms_norm(
    layer: Any, name: str, size: int, epsilon: float = 1e-6, dtype: DType = None
) -> keras.layers.Layer:
    """Returns a built RMS norm along the last axis.

    `dtype` is a dtype or policy; `None` means the policy of `layer`.
    """
    norm = keras.layers.RMSNormalization(
        epsilon=epsilon, dtype=dtype or layer.dtype_policy, name=name
    )
    norm.build((None, None, size))
    return norm
