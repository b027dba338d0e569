"""The channel mix of RWKV, version 7."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import arguments_of, check_positive_int
from attention.contract.checks import check_sequence_shape
from attention.contract.composite_cached_layer import CompositeCachedLayer
from attention.contract.inner_layers import make_dense
from attention.contract.types import Initializer, Shape, Tensor
from attention.recurrent.token_shift import TokenShift


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RWKVChannelMix(CompositeCachedLayer):
    """The channel mix of RWKV-7: a feed-forward layer that sees one token back.

    Its cache is one token for each row. A block takes it from `create_ffn`, as it
    takes any other feed-forward layer.

    Args:
        hidden_dim: int. The inner size.
        kernel_initializer: initializer of the projections.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments and results are those of `Retention`.

    Example:

    >>> import numpy as np
    >>> from attention import RWKVChannelMix
    >>> RWKVChannelMix(64)(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True

    Reference:

    - [Peng et al., 2025](https://arxiv.org/abs/2503.14456)
    """

    def __init__(
        self,
        hidden_dim: int,
        kernel_initializer: Initializer = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_dim = check_positive_int("hidden_dim", hidden_dim)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, inputs_shape: Shape) -> None:
        width = check_sequence_shape(self.name, inputs_shape)
        self.shift = TokenShift(dtype=self.dtype_policy, name="shift")
        self.shift.build(inputs_shape)
        self.mix = self.add_weight(
            name="mix_key",
            shape=(width,),
            initializer=keras.initializers.RandomUniform(0.0, 1.0),
        )
        sizes = self.hidden_dim, width
        self.key_dense = make_dense(self, "key", *sizes, role="ffn_input")
        self.value_dense = make_dense(self, "value", *sizes[::-1], role="ffn_output")

    def transform(self, x: Tensor) -> Tensor:  # type: ignore[override]
        mixed = x + (self.shift(x) - x) * ops.cast(self.mix, x.dtype)  # (b, l, w)
        inner = ops.square(ops.relu(self.key_dense(mixed)))  # (b, l, hidden_dim)
        return self.value_dense(inner)  # (b, l, w)

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(RWKVChannelMix, self), **super().get_config()}
