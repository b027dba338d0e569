"""The state of recurrent mixers, as a cached layer without weights."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import check_positive_int
from attention.contract.cached_layer import CachedLayer
from attention.positions.arithmetic import token_positions
from attention.positions.position_scheme import (
    PositionScheme,
    check_position,
    serialize_position,
)
from attention.recurrent.chunked_scan import linear_recurrence


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class LinearRecurrence(CachedLayer):
    """A matrix for each head that decays, is written to and read from.

    `Retention`, `Mamba2`, `GatedDeltaNet` and `RWKVTimeMix` compute what goes in
    and what is made of what comes out; this layer is all that knows the past. It
    computes in float32 whatever the policy of the layer around it.

    Args:
        num_heads: int. The number of heads.
        key_dim: int. The size of queries and keys.
        value_dim: int or `None`. The size of values; `None` means `key_dim`.
        position: `None` or a position scheme that encodes queries and keys.
        **kwargs: arguments of `keras.layers.Layer`; `dtype` is `"float32"`.

    Call arguments:
        query: tensor of shape `(batch, length, num_heads, key_dim)`.
        key: likewise.
        value: tensor of shape `(batch, length, num_heads, value_dim)`.
        log_decay: tensor of shape `(batch, length, num_heads, 1 or key_dim)`: the
            logarithm of what is left of the state, not positive.
        remove: `None` or tensor of the shape of `key`: the direction along which
            the state is read before it is written to.
        replace: `None` or tensor of the shape of `key`: where what was read along
            `remove` is written to.
        padding_mask: boolean tensor `(batch, length)`: the real tokens.
        cache: a cache made by `create_cache`: the state, float32.
        cache_update_index: as for every `CachedLayer`.

    Returns:
        A float32 tensor of the shape of `value`; with a cache, `(outputs, cache)`.

    Example:

    >>> import numpy as np
    >>> from attention import LinearRecurrence
    >>> layer = LinearRecurrence(num_heads=1, key_dim=1)
    >>> x = np.ones((1, 3, 1, 1), "float32")
    >>> np.array(layer(x, x, x, 0 * x))[0, :, 0, 0].tolist()
    [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        position: PositionScheme | None = None,
        dtype: Any = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype=dtype, **kwargs)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.key_dim = check_positive_int("key_dim", key_dim)
        if value_dim is not None:
            check_positive_int("value_dim", value_dim)
        self.value_dim = value_dim
        self.position = check_position(position)
        if self.position is not None:
            self.position.num_layers += 1

    def build(
        self,
        query_shape: tuple,
        key_shape: tuple | None = None,
        value_shape: tuple | None = None,
        log_decay_shape: tuple | None = None,
        remove_shape: tuple | None = None,
        replace_shape: tuple | None = None,
    ) -> None:
        if self.position is not None and not self.position.built:
            self.position.build(self.num_heads)

    def create_cache(self, batch_size: int, max_length: int) -> Any:
        batch_size = check_positive_int("batch_size", batch_size)
        sizes = (self.key_dim, self.value_dim or self.key_dim)
        return ops.zeros((batch_size, self.num_heads, *sizes), "float32")

    def call(
        self,
        query: Any,
        key: Any,
        value: Any,
        log_decay: Any,
        remove: Any = None,
        replace: Any = None,
        padding_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
    ) -> Any:
        if self.position is not None:
            positions = token_positions(cache_update_index, ops.shape(query)[1])
            query, key = self.position.encode(query, key, positions, positions)
        inputs: list[Any] = [query, key, value, log_decay, remove, replace]
        if padding_mask is not None:
            # A padded token keeps everything, and adds nothing.
            real = ops.cast(padding_mask, "bool")[:, :, None, None]
            inputs = [x if x is None else ops.where(real, x, 0) for x in inputs]
        query, key, value, log_decay, remove, replace = inputs
        state = cache
        if state is None:
            # Zeros of the batch's size, which may not be known.
            first = ops.cast(key[:, 0, :, :, None] * value[:, 0, :, None], "float32")
            state = ops.zeros_like(first)
        outputs, state = linear_recurrence(
            query, key, value, log_decay, state, remove, replace
        )
        return outputs if cache is None else (outputs, state)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            position=serialize_position(self.position),
        )
        return config
