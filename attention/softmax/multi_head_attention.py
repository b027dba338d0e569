"""Multi-head attention with a KV cache."""

from __future__ import annotations

from typing import Any

import keras

from attention.softmax.grouped_query_attention import GroupedQueryAttention


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MultiHeadAttention(GroupedQueryAttention):
    """Cached attention in which each query head has its own key and value.

    Args:
        num_heads: int. The number of heads.
        key_dim: int or `None`. The size of each head; `None` means the width of
            the inputs divided by `num_heads`.
        **kwargs: as for `GroupedQueryAttention`.

    Example:

    >>> import numpy as np
    >>> from attention import MultiHeadAttention
    >>> MultiHeadAttention(num_heads=2)(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True

    Reference:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    def __init__(self, num_heads: int, key_dim: int | None = None, **kwargs: Any):
        super().__init__(num_heads, num_heads, key_dim, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["num_key_value_heads"]
        return config
