"""The named combinations of head layout and position scheme."""

from __future__ import annotations

from typing import Any

import keras

from attention.grouped_query_attention import GroupedQueryAttention
from attention.position_schemes import RelativePositionBias, RotaryPosition


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MultiHeadAttention(GroupedQueryAttention):
    """Cached attention in which each query head has its own key and value.

    Args:
        num_heads: int. The number of heads.
        key_dim: int or `None`. The size of each head; `None` means the width of
            the inputs divided by `num_heads`.
        **kwargs: as for `GroupedQueryAttention`: `value_dim`, `dropout`,
            `use_bias`, `position`, `causal`, `scale`, `kernel_initializer`,
            `bias_initializer`, `name`, `dtype`.

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


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RotaryAttention(GroupedQueryAttention):
    """Cached attention with rotary positions, as in Llama.

    Args:
        num_heads: int. The number of query heads.
        num_key_value_heads: int or `None`. The number of key/value heads;
            `None` means `num_heads`.
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
        position = config.pop("position")["config"]
        config.update(
            {key: position[key] for key in ("max_wavelength", "scaling", "rotary_dim")}
        )
        return config


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
        **kwargs: as for `GroupedQueryAttention`, without `position`.

    Example:

    >>> import numpy as np
    >>> from attention import T5Attention
    >>> T5Attention(num_heads=2)(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True

    Reference:

    - [Raffel et al., 2019](https://arxiv.org/abs/1910.10683)
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int | None = None,
        num_buckets: int = 32,
        max_distance: int = 128,
        causal: bool = True,
        use_bias: bool = False,
        scale: float | None = 1.0,
        **kwargs: Any,
    ):
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

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["num_key_value_heads"]
        position = config.pop("position")["config"]
        config.update({key: position[key] for key in ("num_buckets", "max_distance")})
        return config
