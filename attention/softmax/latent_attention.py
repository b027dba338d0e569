"""Attention that caches one small vector for each token."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import arguments_of, refuse_arguments
from attention.contract.inner_layers import make_dense, make_rms_norm
from attention.contract.roles import declare_axes
from attention.contract.types import Tensor
from attention.positions.position_scheme import PositionScheme
from attention.positions.rotary_position import RotaryPosition
from attention.softmax.dot_product_attention import DotProductAttention
from attention.softmax.kernels import TokensFirst


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class LatentAttention(DotProductAttention):
    """Multi-head latent attention: keys and values of all heads from one vector.

    ```
    x ─► latent_dense ─► latent_norm ─┬─► cache ─► key_up, value_up ─► keys, values of each head
      └► rotary_key_dense ─► encode ──┴─► cache ─► the same rotary key for all heads
    x ─► [query_down ─► query_norm] ─► query_dense ─► queries, the last rotary_dim of them encoded
    ```

    The cache holds `latent_dim + rotary_dim` numbers for each token in place of the
    keys and values of all heads. Without a past, keys and values are computed from
    them, as in multi-head attention. With a past, these projections are absorbed:
    queries are projected to latents, attend to the cache as it is, and the outputs are
    projected to values.

    Args:
        num_heads: int. The number of heads.
        key_dim: int or `None`. The size of the part of each head that knows no
            position; `None` means the width of the inputs divided by `num_heads`.
        value_dim: int or `None`. The size of each value head; `None`: `key_dim`.
        latent_dim: int or `None`. The size of the vector that is cached; `None`
            means `4 * key_dim`, as in DeepSeek's models.
        rotary_dim: even int or `None`. The size of the part of each head that is
            rotated; `None` means half of `key_dim`, made even.
        query_latent_dim: int or `None`. The rank of a low-rank projection of queries;
            `None` means a full projection.
        position: a position scheme of the rotary parts; `None`: `RotaryPosition()`.
        epsilon: float. Of the norms of latents.
        use_bias: bool. Whether the projections have biases.
        **kwargs: as for `GroupedQueryAttention`, without `num_key_value_heads` and
            `query_key_norm`. `scale=None` means `1 / sqrt(key_dim + rotary_dim)`.

    Call arguments:
        query: tensor of shape `(batch, length, width)`.
        attention_mask: as for `GroupedQueryAttention`, and so are `padding_mask`,
            `cache`, `cache_update_index`, `training`, `prefix_length` and
            `segment_ids`.

    Returns:
        A tensor of shape `(batch, length, width)` in the compute dtype. With a
        cache, `(outputs, cache)`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if sizes do not fit together, or tokens not into the cache.

    Example:

    >>> import numpy as np
    >>> from attention import LatentAttention
    >>> layer = LatentAttention(num_heads=4, latent_dim=12, rotary_dim=4)
    >>> layer(np.zeros((1, 3, 32))).shape == (1, 3, 32)
    True
    >>> cache = layer.create_cache(batch_size=1, max_length=100)
    >>> {name: tuple(x.shape) for name, x in cache.items()}
    {'latent': (1, 1, 100, 16)}

    Reference:

    - [DeepSeek-V2, 2024](https://arxiv.org/abs/2405.04434)
    """

    query_norm: Any

    def __init__(
        self,
        num_heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        latent_dim: int | None = None,
        rotary_dim: int | None = None,
        query_latent_dim: int | None = None,
        position: PositionScheme | None = None,
        epsilon: float = 1e-6,
        use_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_arguments(
            self,
            kwargs,
            num_key_value_heads="all heads share one latent",
            query_key_norm="the latent is what is normalized",
        )
        kwargs["position"] = position or RotaryPosition(name="rotary_position")
        kwargs["use_bias"] = use_bias
        super().__init__(num_heads, None, key_dim, value_dim, **kwargs)
        self._set_sizes(latent_dim=latent_dim, rotary_dim=rotary_dim)
        self._set_sizes(query_latent_dim=query_latent_dim)
        if rotary_dim is not None and rotary_dim % 2:
            raise ValueError(f"`rotary_dim` must be even. Received: {rotary_dim=}")
        self.epsilon = epsilon

    def _sizes(self) -> tuple[int, int, int, int]:
        """Returns the sizes of the latent, the rotary part, a key and a value head."""
        key_dim = self.key_dim or self._width // self.num_heads
        rotary_dim = self.rotary_dim or 2 * max(key_dim // 4, 1)
        latent_dim = self.latent_dim or 4 * key_dim
        return latent_dim, rotary_dim, key_dim, self.value_dim or key_dim

    def head_dims(self) -> tuple[int, int]:
        _, rotary_dim, key_dim, value_dim = self._sizes()
        return key_dim + rotary_dim, value_dim

    def build(self, query_shape: tuple) -> None:
        self._check_width(query_shape)
        latent_dim, rotary_dim, key_dim, value_dim = self._sizes()
        width, bias = query_shape[-1], self.use_bias
        size, epsilon = self.query_latent_dim, self.epsilon
        if size is not None:
            self.query_down = make_dense(
                self, "query_down", size, width, bias, "query", (None, None)
            )
            self.query_norm = make_rms_norm(self, "query_norm", size, epsilon)
        source = (*query_shape[:-1], size or width)
        self.query_dense = self.make_projection("query", self.query_heads(), source)
        # What all heads share is not divided among them.
        self.latent_dense = make_dense(
            self, "latent", latent_dim, width, bias, "value", (None, None)
        )
        self.latent_norm = make_rms_norm(self, "latent_norm", latent_dim, epsilon)
        self.rotary_key_dense = make_dense(
            self, "rotary_key", rotary_dim, width, bias, "key", (None, None)
        )
        # Not layers, as they are applied from either side. Their layout is that of
        # decoding, head by head.
        self.key_up = self._kernel("key_up", key_dim, latent_dim)
        self.value_up = self._kernel("value_up", latent_dim, value_dim)
        self.build_output(query_shape)

    def _kernel(self, name: str, *shape: int) -> Tensor:
        initializer = self._initializers()["kernel_initializer"]
        declare_axes(self, {name: ("heads", None, None)})
        return self.add_weight((self.num_heads, *shape), initializer, name=name)

    def cache_sizes(self) -> dict[str, tuple[int, int]]:
        latent_dim, rotary_dim, *_ = self._sizes()
        return {"latent": (1, latent_dim + rotary_dim)}

    def project(
        self, query: Tensor, value: Tensor, key: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        latent = self.latent_norm(self.latent_dense(query))
        latent = ops.concatenate([latent, self.rotary_key_dense(query)], axis=-1)
        if self.query_latent_dim is not None:
            query = self.query_norm(self.query_down(query))
        # (batch, length, num_heads, key_dim + rotary_dim) and
        # (batch, length, 1, latent_dim + rotary_dim)
        return self.query_dense(query), {"latent": latent[:, :, None]}

    def encode_positions(
        self, query: Tensor, new: dict, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        latent_dim, _, key_dim, _ = self._sizes()
        plain, rotary = ops.split(query, [key_dim], axis=-1)
        latent, rotary_key = ops.split(new["latent"], [latent_dim], axis=-1)
        rotary, encoded = super().encode_positions(
            rotary, {"key": rotary_key}, query_positions, key_positions
        )
        query = ops.concatenate([plain, rotary], axis=-1)
        return query, {"latent": ops.concatenate([latent, encoded["key"]], axis=-1)}

    def attend(
        self, query: Tensor, new: Any, past: Any, *options: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        latent_dim, rotary_dim, key_dim, _ = self._sizes()
        latent = new["latent"]  # (batch, length, 1, latent_dim + rotary_dim)
        if past is None:
            # Attends to keys and values of each head.
            shared = latent[:, :, 0, :latent_dim]
            # (batch, length, latent_dim) -> (batch, length, num_heads, dim)
            key = _multiply("blr,hdr->blhd", shared, self.key_up)
            shape = (*ops.shape(query)[:3], rotary_dim)
            rotary_key = ops.broadcast_to(latent[..., latent_dim:], shape)
            key = ops.concatenate([key, rotary_key], axis=-1)
            value = _multiply("blr,hrd->blhd", shared, self.value_up)
            new = {"key": key, "value": value}
            return super().attend(query, new, None, *options, **more)
        # The latents are one key/value head for all queries: `key_up` is absorbed into
        # the queries, and `value_up` into the outputs.
        plain, rotary = ops.split(query, [key_dim], axis=-1)
        # (batch, length, num_heads, latent_dim)
        projected = _multiply("blhd,hdr->blhr", plain, self.key_up)
        query = ops.concatenate([projected, rotary], axis=-1)
        stored = past["latent"]  # (batch, 1, slots, latent_dim + rotary_dim)
        new = {"key": latent, "value": latent}
        past = {"key": TokensFirst(stored), "value": stored}
        found, scores = super().attend(query, new, past, *options, **more)
        # Drops the rotary part, which is not of the values: to cut it from the past
        # would copy that.
        found = _multiply("blhr,hrd->blhd", found[..., :latent_dim], self.value_up)
        return found, scores

    def get_config(self) -> dict[str, Any]:
        config = {**arguments_of(LatentAttention, self), **super().get_config()}
        # One key/value head for all, or one for each: this layer has no choice.
        del config["num_key_value_heads"], config["query_key_norm"]
        return config


def _multiply(equation: str, x: Tensor, weight: Tensor) -> Tensor:
    # In the dtype of `x`: Keras multiplies float64 in float32 on torch.
    return ops.einsum(equation, x, ops.cast(weight, x.dtype))
