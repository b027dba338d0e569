"""The two mixers of RWKV, version 7: across time and across channels."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from attention.contract.arguments import check_positive_int, refuse_arguments
from attention.contract.checks import check_sequence_shape
from attention.contract.composite_cached_layer import CompositeCachedLayer
from attention.recurrent.linear_recurrence import LinearRecurrence
from attention.recurrent.recurrent_mixer import RecurrentMixer, built_dense, float32
from attention.recurrent.short_convolution import TokenShift

# `exp(-0.5)`: a number decays to no less than `exp(-exp(-0.5))` in a step.
_MOST_DECAY = math.exp(-0.5)
_MIXED = ("receptance", "decay", "key", "value", "rate", "gate")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RWKVTimeMix(RecurrentMixer):
    """The time mix of RWKV-7: a state whose numbers decay one by one.

    ```
    x ─► shift ─► mix ─► receptance, decay, key, value, rate ─► state ─► receptance · state ─► norm ─► + bonus ─┐
                   └───► gate ────────────────────────────────────────────────────────────────────────────────► × ─► output

    state = decay * state - unit * rate (unit · state) + key value
    ```

    Args:
        num_heads: int. The number of heads.
        decay_dim: int or `None`. The inner size of the projection to decays; `None`
            means a size for the width of the inputs, as in RWKV's own code, and so
            do the next three.
        rate_dim: int or `None`. Likewise to the rates of replacement.
        value_dim: int or `None`. Likewise to the mix with the first layer's values.
        gate_dim: int or `None`. Likewise to the gate.
        value_residual: bool. Whether values are mixed with those of the first layer,
            which are then an argument: `layer(x, first_value)`.
        kernel_initializer: initializer of the projections.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        first_value: `None`, or what the first layer returned as its values.
        return_value: bool. Whether to return the values, too, for other layers.
        padding_mask: boolean tensor `(batch, length)`: the real tokens.
        cache: a cache made by `create_cache`; its size depends on no length.
        cache_update_index: how many positions the cache has absorbed.

    Returns:
        A tensor of the shape of `x`; with `return_value`, `(outputs, values)`; with a
        cache, `(what is said above, cache)`.

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
        **kwargs: Any,
    ) -> None:
        refuse_arguments(self, kwargs, key_dim="heads divide the width of the inputs")
        super().__init__(num_heads, **kwargs)
        sizes = {
            "decay_dim": decay_dim,
            "rate_dim": rate_dim,
            "value_dim": value_dim,
            "gate_dim": gate_dim,
        }
        for name, size in sizes.items():
            if size is not None:
                check_positive_int(name, size)
        self.decay_dim, self.rate_dim = decay_dim, rate_dim
        self.value_dim, self.gate_dim = value_dim, gate_dim
        self.value_residual = bool(value_residual)

    def build(self, inputs_shape: tuple) -> None:
        check_sequence_shape(self.name, inputs_shape)
        width, heads = inputs_shape[-1], self.num_heads
        key_dim = self._divide(width, inputs_shape)
        self.shift = TokenShift(dtype=self.dtype_policy, name="shift")
        self.shift.build(inputs_shape)
        self.mixes = {
            name: self._small_weight(f"mix_{name}", (width,), _uniform())
            for name in _MIXED
        }
        self.receptance_dense = self._dense("receptance", width, inputs_shape)
        self.key_dense = self._dense("key", width, inputs_shape)
        self.value_dense = self._dense("value", width, inputs_shape)
        self.output_dense = self._dense("output", width, inputs_shape)
        sizes = {
            "decay": self.decay_dim or _inner_size(width, 1.8, 0.5),
            "rate": self.rate_dim or _inner_size(width, 1.8, 0.5),
            "gate": self.gate_dim or _inner_size(width, 0.6, 0.8),
        }
        if self.value_residual:
            sizes["value"] = self.value_dim or _inner_size(width, 1.3, 0.5)
        self.narrow = {
            name: self._pair(name, width, size, inputs_shape)
            for name, size in sizes.items()
        }
        self.biases = {
            name: self._small_weight(f"{name}_bias", (width,), "zeros")
            for name in sizes
            if name != "gate"
        }
        self.unit_scale = self._small_weight("unit_scale", (width,), "ones")
        self.rate_scale = self._small_weight("rate_scale", (width,), "ones")
        self.bonus = self._small_weight("bonus", (heads, key_dim), "zeros")
        self.recurrence = LinearRecurrence(heads, key_dim, name="recurrence")
        self.recurrence.build((None, None, heads, key_dim))
        self.norm_scale = self._small_weight("norm_scale", (width,), "ones")
        self.norm_bias = self._small_weight("norm_bias", (width,), "zeros")
        # As in RWKV's own code: 1e-5 for numbers an eighth as large.
        self._epsilon = 64e-5

    def _pair(self, name: str, width: int, size: int, inputs_shape: tuple) -> list:
        """A projection through fewer numbers than there are channels."""
        inner = (*inputs_shape[:-1], size)
        return [
            self._dense(f"{name}_down", size, inputs_shape),
            self._dense(f"{name}_up", width, inner),
        ]

    def transform(  # type: ignore[override]
        self,
        x: Any,
        first_value: Any = None,
        return_value: bool = False,
        padding_mask: Any = None,
        training: Any = None,
    ) -> Any:
        self._check_first_value(first_value)
        change = self.shift(x) - x
        mixed = {
            name: x + change * ops.cast(mix, x.dtype)
            for name, mix in self.mixes.items()
        }
        receptance = float32(self.receptance_dense(mixed["receptance"]))
        key = float32(self.key_dense(mixed["key"]))
        value = float32(self.value_dense(mixed["value"]))
        # Through `tanh`, a sigmoid, or nothing.
        decay = self._through("decay", mixed["decay"], ops.tanh)
        log_decay = -_MOST_DECAY * ops.sigmoid(decay)
        rate = ops.sigmoid(self._through("rate", mixed["rate"]))
        gate = self._through("gate", mixed["gate"], ops.sigmoid)
        if self.value_residual:
            share = ops.sigmoid(self._through("value", mixed["value"]))
            value = value + (float32(first_value) - value) * share
        unit = self._heads(key * self.unit_scale, self.num_heads)
        length = ops.sqrt(ops.sum(ops.square(unit), axis=-1, keepdims=True) + 1e-24)
        unit = unit / length
        key = key * (1 + (rate - 1) * self.rate_scale)
        receptance, key, heads, log_decay, rate = (
            self._heads(y, self.num_heads)
            for y in (receptance, key, value, log_decay, rate)
        )
        found = self.recurrence(
            receptance, key, heads, log_decay, remove=-unit, replace=unit * rate
        )
        found = self._normalized(found)
        bonus = ops.sum(receptance * key * self.bonus, axis=-1, keepdims=True) * heads
        found = (found + self._join_heads(bonus)) * gate
        outputs = self.output_dense(ops.cast(found, self.compute_dtype))
        if not return_value:
            return outputs
        return outputs, ops.cast(value, self.compute_dtype)

    def _through(self, name: str, x: Any, activation: Any = None) -> Any:
        down, up = self.narrow[name]
        x = down(x)
        x = float32(up(x if activation is None else activation(x)))
        return x + self.biases[name] if name in self.biases else x

    def _normalized(self, x: Any) -> Any:
        """Layer norm of each head, with a scale and a bias for each channel."""
        x = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
        x = self._join_heads(x * ops.rsqrt(variance + self._epsilon))
        return x * self.norm_scale + self.norm_bias

    def _check_first_value(self, first_value: Any) -> None:
        if self.value_residual == (first_value is not None):
            return
        raise ValueError(
            f"Layer '{self.name}' was made with `value_residual="
            f"{self.value_residual}`, so it "
            + (
                "needs `first_value`: what the first layer returns, behind its "
                "outputs, when called with `return_value=True`."
                if self.value_residual
                else "has no use for `first_value`. Make it with `value_residual=True`."
            )
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["key_dim"]
        config.update(
            decay_dim=self.decay_dim,
            rate_dim=self.rate_dim,
            value_dim=self.value_dim,
            gate_dim=self.gate_dim,
            value_residual=self.value_residual,
        )
        return config


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RWKVChannelMix(CompositeCachedLayer):
    """The channel mix of RWKV-7: a feed-forward layer that sees one token back.

    It has a cache of one token for each row, so it is a cached layer; a block takes
    it from `create_ffn` as it takes any other.

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
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_dim = check_positive_int("hidden_dim", hidden_dim)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, inputs_shape: tuple) -> None:
        check_sequence_shape(self.name, inputs_shape)
        width = inputs_shape[-1]
        self.shift = TokenShift(dtype=self.dtype_policy, name="shift")
        self.shift.build(inputs_shape)
        self.mix = self.add_weight(
            name="mix_key", shape=(width,), initializer=_uniform()
        )
        self.key_dense = built_dense(self, "key", self.hidden_dim, inputs_shape)
        inner = (*inputs_shape[:-1], self.hidden_dim)
        self.value_dense = built_dense(self, "value", width, inner)

    def transform(self, x: Any, padding_mask: Any = None, training: Any = None) -> Any:
        mixed = x + (self.shift(x) - x) * ops.cast(self.mix, x.dtype)
        return self.value_dense(ops.square(ops.relu(self.key_dense(mixed))))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            hidden_dim=self.hidden_dim,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
        )
        return config


def _uniform() -> keras.initializers.Initializer:
    return keras.initializers.RandomUniform(0.0, 1.0)


def _inner_size(width: int, factor: float, power: float) -> int:
    """The sizes in RWKV's own code: multiples of 32 that grow with the width."""
    return max(32, 32 * round(factor * width**power / 32))
