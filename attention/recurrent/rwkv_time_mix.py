"""The time mix of RWKV, version 7."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from attention.contract.arguments import (
    arguments_of,
    check_optional_positive_int,
    refuse_arguments,
)
from attention.contract.checks import check_sequence_shape
from attention.contract.inner_layers import make_dense
from attention.contract.roles import declare_axes
from attention.contract.types import Shape, Tensor
from attention.recurrent.heads import float32, join_heads, split_heads
from attention.recurrent.recurrent_mixer import RecurrentMixer
from attention.recurrent.token_shift import TokenShift

# A state decays by no more than `exp(-exp(-0.5))` in a step.
_STRONGEST_LOG_DECAY = -math.exp(-0.5)
_MIXED = ("receptance", "decay", "key", "value", "rate", "gate")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RWKVTimeMix(RecurrentMixer):
    """The time mix of RWKV-7: a state in which each row has its own decay.

    ```
    x ─► shift ─► mix ─► receptance, decay, key, value, rate ─► state ─► receptance · state ─► norm ─► + bonus ─┐
                   └───► gate ────────────────────────────────────────────────────────────────────────────────► × ─► output

    state = decay * state - unit * rate (unit · state) + key value
    ```

    Args:
        num_heads: int. The number of heads.
        decay_dim: int or `None`. The rank of the low-rank projection to decays;
            `None` means one that fits the width of the inputs, as in RWKV's own code.
        rate_dim: int or `None`. The rank of that to the rates of replacement.
        value_dim: int or `None`. The rank of that to the share of the first values.
        gate_dim: int or `None`. The rank of that to the gate.
        value_residual: bool. Whether values are mixed with those of the first layer,
            which are then an argument: `layer(x, first_value)`.
        epsilon: float. Of the norm of each head. RWKV's own code has 1e-5 times the
            size of a head, of 64.
        **kwargs: `kernel_initializer`, and arguments of `keras.layers.Layer`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        first_value: `None`, or what the first layer returned, of the shape of `x`.
        return_value: bool. Whether to return the values, too, for other layers.
        padding_mask: as for `Retention`, and so are `cache` and `cache_update_index`.

    Returns:
        A tensor of the shape of `x`, or with `return_value` two, `(outputs, values)`;
        with a cache, a tuple of these and of the cache.

    Raises:
        ValueError: if `num_heads` does not divide the width, or `first_value` is
            given to a layer that has no use for it, or is missing.

    Example:

    >>> import numpy as np
    >>> from attention import RWKVTimeMix
    >>> layer = RWKVTimeMix(num_heads=4)
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True

    Reference:

    - [Peng et al., 2025](https://arxiv.org/abs/2503.14456)
    """

    def __init__(
        self,
        num_heads: int,
        decay_dim: int | None = None,
        rate_dim: int | None = None,
        value_dim: int | None = None,
        gate_dim: int | None = None,
        value_residual: bool = False,
        epsilon: float = 64e-5,
        **kwargs: Any,
    ) -> None:
        refuse_arguments(self, kwargs, key_dim="heads divide the width of the inputs")
        super().__init__(num_heads, **kwargs)
        self.decay_dim = check_optional_positive_int("decay_dim", decay_dim)
        self.rate_dim = check_optional_positive_int("rate_dim", rate_dim)
        self.value_dim = check_optional_positive_int("value_dim", value_dim)
        self.gate_dim = check_optional_positive_int("gate_dim", gate_dim)
        self.value_residual = bool(value_residual)
        self.epsilon = epsilon

    def build(self, inputs_shape: Shape) -> None:
        width = check_sequence_shape(self.name, inputs_shape)
        heads, key_dim = self.num_heads, self.head_size(width, inputs_shape)
        self.shift = TokenShift(dtype=self.dtype_policy, name="shift")
        self.shift.build(inputs_shape)
        self.mixes = {
            name: self.add_float32_weight(
                f"mix_{name}", (width,), keras.initializers.RandomUniform(0.0, 1.0)
            )
            for name in _MIXED
        }
        self.receptance_dense = make_dense(
            self, "receptance", width, width, role="query"
        )
        self.key_dense = make_dense(self, "key", width, width)
        self.value_dense = make_dense(self, "value", width, width)
        self.output_dense = make_dense(self, "output", width, width)
        ranks = {
            "decay": self.decay_dim or _rank(width, 1.8, 0.5),
            "rate": self.rate_dim or _rank(width, 1.8, 0.5),
            "gate": self.gate_dim or _rank(width, 0.6, 0.8),
        }
        if self.value_residual:
            ranks["value"] = self.value_dim or _rank(width, 1.3, 0.5)
        # Low-rank projections: down to the rank, and up to the width.
        self.narrow = {
            name: [
                make_dense(self, f"{name}_down", rank, width, axes=(None, None)),
                make_dense(self, f"{name}_up", width, rank, axes=(None, "heads")),
            ]
            for name, rank in ranks.items()
        }
        self.biases = {
            name: self.add_float32_weight(f"{name}_bias", (width,), "zeros")
            for name in ranks
            if name != "gate"
        }
        self.unit_scale = self.add_float32_weight("unit_scale", (width,), "ones")
        self.rate_scale = self.add_float32_weight("rate_scale", (width,), "ones")
        declare_axes(self, {"bonus": ("heads", None)})
        self.bonus = self.add_float32_weight("bonus", (heads, key_dim), "zeros")
        self.recurrence = self.make_recurrence(key_dim)
        self.norm_scale = self.add_float32_weight("norm_scale", (width,), "ones")
        self.norm_bias = self.add_float32_weight("norm_bias", (width,), "zeros")

    def transform(  # type: ignore[override]
        self,
        x: Tensor,
        first_value: Tensor | None = None,
        return_value: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        self._check_first_value(first_value)
        # Here k = v = w / h: up to the heads, all tensors are (b, l, w).
        change = self.shift(x) - x
        mixed = {
            name: x + change * ops.cast(mix, x.dtype)
            for name, mix in self.mixes.items()
        }
        receptance = float32(self.receptance_dense(mixed["receptance"]))
        key = float32(self.key_dense(mixed["key"]))
        value = float32(self.value_dense(mixed["value"]))
        decay = self._low_rank("decay", mixed["decay"], ops.tanh)
        log_decay = _STRONGEST_LOG_DECAY * ops.sigmoid(decay)
        rate = ops.sigmoid(self._low_rank("rate", mixed["rate"]))
        gate = self._low_rank("gate", mixed["gate"], ops.sigmoid)
        if self.value_residual:
            share = ops.sigmoid(self._low_rank("value", mixed["value"]))
            value = value + (float32(first_value) - value) * share
        unit = split_heads(key * self.unit_scale, self.num_heads)  # (b, l, h, k)
        length = ops.sqrt(ops.sum(ops.square(unit), axis=-1, keepdims=True) + 1e-24)
        unit = unit / length
        key = key * (1 + (rate - 1) * self.rate_scale)
        # (b, l, w) -> (b, l, h, k)
        receptance, key, values, log_decay, rate = (
            split_heads(y, self.num_heads)
            for y in (receptance, key, value, log_decay, rate)
        )
        heads = self.recurrence(
            receptance, key, values, log_decay, remove=-unit, replace=unit * rate
        )
        bonus = ops.sum(receptance * key * self.bonus, axis=-1, keepdims=True) * values
        outputs = (self._normalize(heads) + join_heads(bonus)) * gate  # (b, l, w)
        outputs = self.output_dense(ops.cast(outputs, self.compute_dtype))
        if not return_value:
            return outputs
        return outputs, ops.cast(value, self.compute_dtype)

    def _low_rank(
        self, name: str, x: Tensor, activation: Callable | None = None
    ) -> Tensor:
        """Projects down, activates, projects up and adds a bias, if there is one."""
        down, up = self.narrow[name]
        x = down(x)  # (b, l, rank)
        x = float32(up(x if activation is None else activation(x)))  # (b, l, w)
        return x + self.biases[name] if name in self.biases else x

    def _normalize(self, heads: Tensor) -> Tensor:
        """Returns the layer norm of each head, `(b, l, h, v)`, as `(b, l, w)`."""
        heads = heads - ops.mean(heads, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(heads), axis=-1, keepdims=True)
        x = join_heads(heads * ops.rsqrt(variance + self.epsilon))
        return x * self.norm_scale + self.norm_bias

    def _check_first_value(self, first_value: Tensor | None) -> None:
        if self.value_residual == (first_value is not None):
            return
        raise ValueError(
            f"Layer '{self.name}' was made with `value_residual="
            f"{self.value_residual}`, so it "
            + (
                "needs `first_value`: the second output of the first layer, called "
                "with `return_value=True`."
                if self.value_residual
                else "has no use for `first_value`. Make it with `value_residual=True`."
            )
        )

    def get_config(self) -> dict[str, Any]:
        config = {**arguments_of(RWKVTimeMix, self), **super().get_config()}
        del config["key_dim"]
        return config


def _rank(width: int, factor: float, power: float) -> int:
    """Returns the rank in RWKV's own code: a multiple of 32 that grows with width."""
    return max(32, 32 * round(factor * width**power / 32))
