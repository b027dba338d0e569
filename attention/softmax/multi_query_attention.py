"""Multi-query attention."""

from __future__ import annotations

from typing import Any

import keras

from attention.softmax.grouped_query_attention import GroupedQueryAttention


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MultiQueryAttention(GroupedQueryAttention):
    """Cached attention in which all query heads share one key and value.

    Args:
        num_heads: int. The number of query heads.
        key_dim: int or `None`. The size of each head; `None` means the width of
            the inputs divided by `num_heads`.
        **kwargs: as for `GroupedQueryAttention`.

    Example:

    >>> import numpy as np
    >>> from attention import MultiQueryAttention
    >>> layer = MultiQueryAttention(num_heads=4)
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True
    >>> layer.create_cache(batch_size=1, max_length=32)["key"].shape[1]
    1

    Reference:

    - [Shazeer, 2019](https://arxiv.org/abs/1911.02150)
    """

    def __init__(self, num_heads: int, key_dim: int | None = None, **kwargs: Any):
        super().__init__(num_heads, 1, key_dim, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["num_key_value_heads"]
        return config
