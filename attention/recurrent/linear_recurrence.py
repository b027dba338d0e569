"""The state of recurrent mixers, as a cached layer without weights."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import (
    arguments_of,
    check_optional_positive_int,
    check_positive_int,
)
from attention.contract.cached_layer import CachedLayer
from attention.contract.types import Cache, DType, Index, Mask, Shape, Tensor
from attention.positions.arithmetic import token_positions
from attention.positions.position_scheme import (
    PositionScheme,
    check_position,
    serialize_position,
)
from attention.recurrent.chunked_scan import linear_recurrence


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class LinearRecurrence(CachedLayer):
    """A state for each head, a matrix that decays, is written to and read from.

    ```
    state = exp(log_decay) * state + replace (remove · state) + key value
    output = query · state
    ```

    It is the part of `Retention`, `Mamba2`, `GatedDeltaNet` and `RWKVTimeMix` that
    has a cache. It computes in float32 whatever the policy of the layer around it.

    Args:
        num_heads: int. The number of heads.
        key_dim: int. The size of queries and keys.
        value_dim: int or `None`. The size of values; `None` means `key_dim`.
        position: `None` or a position scheme that encodes queries and keys.
        **kwargs: arguments of `keras.layers.Layer`; `dtype` is `"float32"`.

    Call arguments:
        query: tensor of shape `(batch, length, num_heads, key_dim)`.
        key: tensor of the shape of `query`.
        value: tensor of shape `(batch, length, num_heads, value_dim)`.
        log_decay: tensor of shape `(batch, length, num_heads, 1 or key_dim)`: the
            logarithm of the factor by which the state decays, not positive.
        remove: `None` or tensor of the shape of `key`: the direction along which
            the state is read before it is written to.
        replace: `None` or tensor like `key`: where what was read is written to.
        padding_mask: as for every `CachedLayer`, and so is `cache_update_index`.
        cache: a cache made by `create_cache`: the state, float32.

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
        dtype: DType = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype=dtype, **kwargs)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.key_dim = check_positive_int("key_dim", key_dim)
        self.value_dim = check_optional_positive_int("value_dim", value_dim)
        self.position = check_position(position)

    def build(self, query_shape: Shape, **other_shapes: Shape) -> None:
        if self.position is not None:
            self.position.build_for_layer(self.num_heads)

    def create_cache(self, batch_size: int, max_length: int) -> Cache:
        batch_size = check_positive_int("batch_size", batch_size)
        sizes = (self.key_dim, self.value_dim or self.key_dim)
        return ops.zeros((batch_size, self.num_heads, *sizes), "float32")

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        remove: Tensor | None = None,
        replace: Tensor | None = None,
        padding_mask: Mask | None = None,
        cache: Cache | None = None,
        cache_update_index: Index | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        if self.position is not None:
            length = ops.shape(query)[1]
            positions = token_positions(cache_update_index, length, segment_ids)
            query, key = self.position.encode(query, key, positions, positions)
        inputs = [query, key, value, log_decay, remove, replace]
        if padding_mask is not None:
            # A padded token changes nothing: no decay, and nothing added.
            real = ops.cast(padding_mask, "bool")[:, :, None, None]  # (b, l, 1, 1)
            inputs = [x if x is None else ops.where(real, x, 0) for x in inputs]
        query, key, value, log_decay, remove, replace = inputs
        state = cache  # (b, h, k, v)
        if state is None:
            # `zeros_like`, as the batch size may not be known.
            state = ops.zeros_like(key[:, 0, :, :, None] * value[:, 0, :, None])
        outputs, state = linear_recurrence(
            query, key, value, log_decay, state, remove, replace, segment_ids
        )
        return outputs if cache is None else (outputs, state)

    def get_config(self) -> dict[str, Any]:
        config = {**arguments_of(LinearRecurrence, self), **super().get_config()}
        return {**config, "position": serialize_position(self.position)}
