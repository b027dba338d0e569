"""Attention with T5's relative position bias."""

from __future__ import annotations

from typing import Any

import keras

from attention.positions.position_scheme import PositionScheme
from attention.positions.relative_position_bias import RelativePositionBias
from attention.softmax.grouped_query_attention import GroupedQueryAttention


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class T5Attention(GroupedQueryAttention):
    """Cached attention with T5's relative position bias and unscaled logits.

    Args:
        num_heads: int. The number of heads.
        key_dim: int or `None`. The size of each head; `None` means the width of
            the inputs divided by `num_heads`.
        num_buckets: int. The number of buckets of relative positions.
        max_distance: int. The distance from which on all share one bucket.
        causal: bool. Whether a token attends to no later one; if not, half of
            the buckets are for later tokens.
        use_bias: bool. Whether the projections have biases. T5's have none.
        scale: float. The factor of the logits; T5 has none.
        position: `None`, or the `RelativePositionBias` of another layer, with which it is
            shared, as all layers of a side do in T5.
        **kwargs: as for `GroupedQueryAttention`.

    Example:

    >>> import numpy as np
    >>> from attention import T5Attention
    >>> T5Attention(num_heads=2)(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True

    Reference:

    - [Raffel et al., 2019](https://arxiv.org/abs/1910.10683)
    """

    position: Any

    def __init__(
        self,
        num_heads: int,
        key_dim: int | None = None,
        num_buckets: int = 32,
        max_distance: int = 128,
        causal: bool = True,
        use_bias: bool = False,
        scale: float | None = 1.0,
        position: PositionScheme | None = None,
        **kwargs: Any,
    ):
        shares_position = position is not None
        if position is None:
            position = RelativePositionBias(
                num_buckets,
                max_distance,
                bidirectional=not causal,
                name="relative_position_bias",
            )
        super().__init__(
            num_heads,
            num_heads,
            key_dim,
            position=position,
            causal=causal,
            use_bias=use_bias,
            scale=scale,
            **kwargs,
        )
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self._shares_position = shares_position

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["num_key_value_heads"]
        config["num_buckets"] = self.num_buckets
        config["max_distance"] = self.max_distance
        # Others may have been given the one that this layer made.
        if not self._shares_position and self.position.num_layers < 2:
            config["position"] = None
        return config
