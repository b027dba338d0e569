"""Retention, the mixer of RetNet."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import arguments_of, check_optional_positive_int
from attention.contract.checks import check_sequence_shape
from attention.contract.inner_layers import make_dense, make_rms_norm
from attention.contract.types import Shape, Tensor
from attention.positions.rotary_position import RotaryPosition
from attention.recurrent.heads import float32, gate_heads, split_heads
from attention.recurrent.recurrent_mixer import RecurrentMixer


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Retention(RecurrentMixer):
    """Multi-scale retention: rotary attention without softmax, with decay.

    ```
    x ─► query, key, value ─► encode ─► state = decay * state + key value ─► query · state ─► norm ─┐
      └► gate ─► silu ──────────────────────────────────────────────────────────────────────────► × ─► output
    ```

    Each head has its own decay, `1 - 2 ** (-5 - head)`, so that some heads see near
    and others far. The paper's parallel, chunkwise and recurrent forms are one
    computation here: in chunks, with one matrix for each head as the cache.

    Args:
        num_heads: int. The number of heads.
        key_dim: int or `None`. The size of query and key heads; even; `None` means
            the width of the inputs divided by `num_heads`.
        value_dim: int or `None`. The size of value heads; `None`: `2 * key_dim`.
        epsilon: float. Of the norm of each head.
        **kwargs: `kernel_initializer`, and arguments of `keras.layers.Layer`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        padding_mask: boolean tensor of shape `(batch, length)`, true for real tokens.
        cache: a cache made by `create_cache`; its size depends on no length.
        cache_update_index: as for every `CachedLayer`.

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
        self.value_dim = check_optional_positive_int("value_dim", value_dim)
        self.epsilon = epsilon

    def build(self, inputs_shape: Shape) -> None:
        width = check_sequence_shape(self.name, inputs_shape)
        heads = self.num_heads
        key_dim = self.key_dim or self.head_size(width, inputs_shape)
        value_dim = self.value_dim or 2 * key_dim
        self.query_dense = make_dense(self, "query", heads * key_dim, width)
        self.key_dense = make_dense(self, "key", heads * key_dim, width)
        self.value_dense = make_dense(self, "value", heads * value_dim, width)
        self.gate_dense = make_dense(self, "gate", heads * value_dim, width)
        position = RotaryPosition(name="rotary_position")
        self.recurrence = self.make_recurrence(key_dim, value_dim, position)
        # As for `gate_heads`.
        self.head_norm = make_rms_norm(
            self, "head_norm", value_dim, self.epsilon, dtype="float32"
        )
        self.output_dense = make_dense(self, "output", width, heads * value_dim)
        self._scale = key_dim**-0.5
        decays = 1 - 2.0 ** (-5 - np.arange(heads))
        self._log_decays = np.log(decays).astype("float32")[:, None]  # (h, 1)

    def transform(self, x: Tensor) -> Tensor:  # type: ignore[override]
        # (b, l, w) -> (b, l, h, k) and (b, l, h, v)
        query, key, value = (
            split_heads(dense(x), self.num_heads)
            for dense in (self.query_dense, self.key_dense, self.value_dense)
        )
        log_decay = ops.zeros_like(float32(query[..., :1]))
        log_decay = log_decay + ops.convert_to_tensor(self._log_decays)
        heads = self.recurrence(query, key * self._scale, value, log_decay)
        outputs = gate_heads(self.head_norm(heads), self.gate_dense(x))  # (b, l, h * v)
        return self.output_dense(ops.cast(outputs, self.compute_dtype))  # (b, l, w)

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(Retention, self), **super().get_config()}
