"""Retention, the mixer of RetNet."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import check_positive_int
from attention.contract.checks import check_sequence_shape
from attention.positions.rotary_position import RotaryPosition
from attention.recurrent.linear_recurrence import LinearRecurrence
from attention.recurrent.recurrent_mixer import RecurrentMixer, float32


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Retention(RecurrentMixer):
    """Multi-scale retention: rotary attention without softmax, with decay.

    ```
    x ─► query, key, value ─► encode ─► state = decay * state + key value ─► query · state ─► norm ─┐
      └► gate ─► silu ──────────────────────────────────────────────────────────────────────────► × ─► output
    ```

    Each head has its own decay, `1 - 2 ** (-5 - head)`, so that some see near and
    some see far. Trained in chunks, decoded with one matrix for each head: the
    parallel, the chunkwise and the recurrent form of the paper are one computation.

    Args:
        num_heads: int. The number of heads.
        key_dim: int or `None`. The size of query and key heads; even; `None` means
            the width of the inputs divided by `num_heads`.
        value_dim: int or `None`. The size of value heads; `None` means
            `2 * key_dim`.
        epsilon: float. Of the norm of each head.
        kernel_initializer: initializer of the projections.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        padding_mask: boolean tensor `(batch, length)`: the real tokens.
        cache: a cache made by `create_cache`; its size depends on no length.
        cache_update_index: how many positions the cache has absorbed.

    Returns:
        A tensor of the shape of `x`; with a cache, `(outputs, cache)`.

    Raises:
        ValueError: if the width of the inputs does not fit the heads.

    Example:

    >>> import numpy as np
    >>> from attention import Retention
    >>> layer = Retention(num_heads=4)
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True

    Reference:

    - [Sun et al., 2023](https://arxiv.org/abs/2307.08621)
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        epsilon: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, key_dim, **kwargs)
        if value_dim is not None:
            check_positive_int("value_dim", value_dim)
        self.value_dim, self.epsilon = value_dim, epsilon

    def build(self, inputs_shape: tuple) -> None:
        check_sequence_shape(self.name, inputs_shape)
        width, heads = inputs_shape[-1], self.num_heads
        key_dim = self.key_dim or self._divide(width, inputs_shape)
        value_dim = self.value_dim or 2 * key_dim
        self.query_dense = self._dense("query", heads * key_dim, inputs_shape)
        self.key_dense = self._dense("key", heads * key_dim, inputs_shape)
        self.value_dense = self._dense("value", heads * value_dim, inputs_shape)
        self.gate_dense = self._dense("gate", heads * value_dim, inputs_shape)
        self.recurrence = LinearRecurrence(
            heads,
            key_dim,
            value_dim,
            position=RotaryPosition(name="rotary_position"),
            name="recurrence",
        )
        self.recurrence.build((None, None, heads, key_dim))
        self.head_norm = self._head_norm(value_dim, self.epsilon)
        inner = (*inputs_shape[:-1], heads * value_dim)
        self.output_dense = self._dense("output", width, inner)
        self._scale = key_dim**-0.5
        decays = 1 - 2.0 ** (-5 - np.arange(heads))
        self._log_decays = np.log(decays).astype("float32")[:, None]

    def transform(self, x: Any, padding_mask: Any = None, training: Any = None) -> Any:
        query, key, value = (
            self._heads(dense(x), self.num_heads)
            for dense in (self.query_dense, self.key_dense, self.value_dense)
        )
        log_decay = ops.zeros_like(float32(query[..., :1])) + self._log_decays
        found = self.recurrence(query, key * self._scale, value, log_decay)
        found = self.head_norm(ops.cast(found, self.compute_dtype))
        gate = ops.silu(self.gate_dense(x))
        return self.output_dense(self._join_heads(found) * gate)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(value_dim=self.value_dim, epsilon=self.epsilon)
        return config
