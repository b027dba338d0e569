"""Attention with rotary positions."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract.arguments import arguments_of
from attention.positions.rotary_position import RotaryPosition
from attention.softmax.grouped_query_attention import GroupedQueryAttention


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RotaryAttention(GroupedQueryAttention):
    """Cached attention with rotary positions, as in Llama.

    Args:
        num_heads: int. The number of query heads.
        num_key_value_heads: int or `None`, which means `num_heads`.
        key_dim: int or `None`. The size of each head; `None` means the width of
            the inputs divided by `num_heads`.
        max_wavelength: number. The longest wavelength, or `rope_theta`.
        scaling: `None` or a dict, see `RotaryPosition`.
        rotary_dim: even int or `None`. How much of a head is rotated.
        **kwargs: as for `GroupedQueryAttention`, without `position`.

    Example:

    >>> import numpy as np
    >>> from attention import RotaryAttention
    >>> layer = RotaryAttention(num_heads=4, num_key_value_heads=2, use_bias=False)
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True

    Reference:

    - [Su et al., 2021](https://arxiv.org/abs/2104.09864)
    """

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int | None = None,
        key_dim: int | None = None,
        max_wavelength: float = 10_000,
        scaling: dict[str, Any] | None = None,
        rotary_dim: int | None = None,
        **kwargs: Any,
    ):
        position = RotaryPosition(
            max_wavelength, scaling, rotary_dim, name="rotary_position"
        )
        if num_key_value_heads is None:
            num_key_value_heads = num_heads
        super().__init__(
            num_heads, num_key_value_heads, key_dim, position=position, **kwargs
        )

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["position"]
        return {**config, **arguments_of(RotaryPosition, self.position)}
