"""Attention that caches one small vector for each token."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.caches.choice import make_cache_policy
from attention.caches.writes import computed_after
from attention.contract.arguments import check_positive_int, refuse_arguments
from attention.contract.initializers import clone_initializer
from attention.contract.padding import zero_padding
from attention.positions.arithmetic import (
    hide_padding,
    is_zero,
    join_positions,
    token_positions,
)
from attention.positions.position_scheme import PositionScheme
from attention.positions.rotary_position import RotaryPosition
from attention.softmax.dot_product_attention import DotProductAttention
from attention.softmax.kernels import TokensFirst
from attention.softmax.prefix import (
    check_prefix_length,
    check_segment_ids,
    only_whole_prefixes,
)
from attention.softmax.visibility import Visibility, check_attention_mask


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class LatentAttention(DotProductAttention):
    """Multi-head latent attention: keys and values of all heads from one vector.

    ```
    x ─► latent_dense ─► latent_norm ─┬─► cache ─► key_up, value_up ─► keys, values of each head
      └► rotary_key_dense ─► encode ──┴─► cache ─► the same rotary key for all heads
    x ─► [query_down ─► query_norm] ─► query_dense ─► queries, the last rotary_dim of them encoded
    ```

    A cache of `latent_dim + rotary_dim` numbers for each token stands for the keys
    and values of all heads. Without a past, keys and values are computed from it, as
    in multi-head attention; with one, the projections that would do that are
    absorbed: queries are projected to latents, and what is found is projected to
    values, so that the cache is attended to as it is.

    Args:
        num_heads: int. The number of heads.
        key_dim: int or `None`. The size of the part of each head that knows no
            position; `None` means the width of the inputs divided by `num_heads`.
        value_dim: int or `None`. The size of each value head; `None` means
            `key_dim`.
        latent_dim: int or `None`. The size of the vector that is cached; `None`
            means `4 * key_dim`, as in DeepSeek's models.
        rotary_dim: even int or `None`. The size of the part of each head that is
            rotated; `None` means half of `key_dim`, made even.
        query_latent_dim: int or `None`. Queries are projected through so many
            numbers; `None` means directly.
        position: a position scheme that encodes the rotary parts, or `None`, which
            means `RotaryPosition()`.
        epsilon: float. Of the norms of latents.
        window: int or `None`. How many positions a query sees, itself included.
        cache_dtype: `None` or `"int8"`, see `GroupedQueryAttention`.
        use_bias: bool. Whether the projections have biases.
        **kwargs: as for `GroupedQueryAttention`: `dropout`, `scale`,
            `logit_soft_cap`, `attention_sinks`, `output_gate`,
            `kernel_initializer`, `bias_initializer`, `name`, `dtype`. `scale=None`
            means `1 / sqrt(key_dim + rotary_dim)`.

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

    position: PositionScheme
    query_norm: Any

    whole_prompt_arguments = ("prefix_length",)

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
        window: int | None = None,
        cache_dtype: str | None = None,
        use_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_arguments(
            self,
            kwargs,
            num_key_value_heads="all heads share one latent",
            query_key_norm="the latent is what is normalized",
        )
        if position is None:
            position = RotaryPosition(name="rotary_position")
        super().__init__(
            num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            use_bias=use_bias,
            position=position,
            window=window,
            **kwargs,
        )
        sizes = {
            "latent_dim": latent_dim,
            "rotary_dim": rotary_dim,
            "query_latent_dim": query_latent_dim,
        }
        for name, size in sizes.items():
            if size is not None:
                check_positive_int(name, size)
        if rotary_dim is not None and rotary_dim % 2:
            raise ValueError(
                f"`rotary_dim` must be even. Received: rotary_dim={rotary_dim}"
            )
        self.latent_dim, self.rotary_dim = latent_dim, rotary_dim
        self.query_latent_dim, self.epsilon = query_latent_dim, epsilon
        self.cache_dtype = cache_dtype
        self.cache_policy = make_cache_policy(window, cache_dtype, axes={"latent": 2})

    def _sizes(self) -> tuple[int, int, int, int]:
        """The sizes of the latent, the rotary part, and a key and a value head."""
        key_dim = self.key_dim or self._width // self.num_heads
        rotary_dim = self.rotary_dim or 2 * max(key_dim // 4, 1)
        latent_dim = self.latent_dim or 4 * key_dim
        return latent_dim, rotary_dim, key_dim, self.value_dim or key_dim

    def _head_dims(self) -> tuple[int, int]:
        _, rotary_dim, key_dim, value_dim = self._sizes()
        return key_dim + rotary_dim, value_dim

    def build(self, query_shape: tuple) -> None:
        self._check_width(query_shape)
        latent_dim, rotary_dim, key_dim, value_dim = self._sizes()
        source = query_shape
        if self.query_latent_dim is not None:
            self.query_down = self._dense("query_down", self.query_latent_dim)
            self.query_down.build(source)
            source = (*source[:-1], self.query_latent_dim)
            self.query_norm = self._norm(
                "query_norm", self.query_latent_dim, self.epsilon
            )
        self.query_dense = self._project("query", self._query_heads(), source)
        self.latent_dense = self._dense("latent", latent_dim)
        self.latent_dense.build(query_shape)
        self.latent_norm = self._norm("latent_norm", latent_dim, self.epsilon)
        self.rotary_key_dense = self._dense("rotary_key", rotary_dim)
        self.rotary_key_dense.build(query_shape)
        # Not layers: absorbed, they are applied from either side. Laid out as
        # decoding multiplies them, head by head.
        self.key_up, self.value_up = (
            self.add_weight(
                name=name,
                shape=(self.num_heads, *shape),
                initializer=clone_initializer(self.kernel_initializer),
            )
            for name, shape in (
                ("key_up", (key_dim, latent_dim)),
                ("value_up", (latent_dim, value_dim)),
            )
        )
        self._build_output(query_shape)

    def _dense(self, name: str, size: int) -> keras.layers.Layer:
        return keras.layers.Dense(
            size, use_bias=self.use_bias, name=name, **self._initializers()
        )

    def create_cache(self, batch_size: int, max_length: int) -> Any:
        if self.key_dim is None:
            self._require_built()
        latent_dim, rotary_dim, *_ = self._sizes()
        sizes = {"latent": (1, latent_dim + rotary_dim)}
        return self.cache_policy.create(
            batch_size, max_length, sizes, self.compute_dtype
        )

    def can_rewind(self, cache: Any, from_index: int, to_index: int) -> bool:
        return super().can_rewind(
            cache, from_index, to_index
        ) or self.cache_policy.can_rewind(cache, from_index, to_index)

    def call(
        self,
        query: Any,
        attention_mask: Any = None,
        padding_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        training: bool | None = None,
        prefix_length: Any = None,
        segment_ids: Any = None,
    ) -> Any:
        self._check_cached_call(cache, cache_update_index, segment_ids)
        if attention_mask is not None:
            check_attention_mask(
                attention_mask, query, query if cache is None else None
            )
        if padding_mask is not None:
            padding_mask = ops.cast(padding_mask, "bool")
        if prefix_length is not None:
            prefix_length = check_prefix_length(self.name, prefix_length, query)
        if segment_ids is not None:
            segment_ids = check_segment_ids(self.name, segment_ids, query)
        query = zero_padding(query, padding_mask)
        positions = token_positions(cache_update_index, ops.shape(query)[1])
        key_dim = self._sizes()[2]
        inner = query
        if self.query_latent_dim is not None:
            inner = self.query_norm(self.query_down(query))
        plain, rotary = ops.split(self.query_dense(inner), [key_dim], axis=-1)
        rotary_key = self.rotary_key_dense(query)[:, :, None]
        rotary, rotary_key = self.position.encode(
            rotary, rotary_key, positions, positions
        )
        latent = self.latent_norm(self.latent_dense(query))[:, :, None]
        # (batch, length, 1, latent_dim + rotary_dim)
        latent = ops.concatenate([latent, rotary_key], axis=-1)
        if cache is not None:
            latent = self.cache_policy.as_stored(latent)
        options = {
            "causal": self.causal,
            "window": self.window,
            "attention_mask": attention_mask,
            "prefix_length": prefix_length,
        }
        if cache is None or is_zero(cache_update_index):
            visibility = Visibility(
                positions,
                positions,
                key_padding_mask=padding_mask,
                segment_ids=None if segment_ids is None else (segment_ids,) * 2,
                in_order=True,
                **options,
            )
            outputs = self._attend_expanded(plain, rotary, latent, visibility, training)
        else:
            past_positions = self.cache_policy.positions(cache, cache_update_index)
            key_positions = positions
            if prefix_length is not None:
                key_positions = hide_padding(positions, padding_mask)
            visibility = Visibility(
                positions, join_positions(past_positions, key_positions), **options
            )
            past = self.cache_policy.read(cache, latent.dtype)["latent"]
            outputs = self._attend_absorbed(
                plain, rotary, past, latent, visibility, training
            )
        outputs = self._project_output(outputs, query)
        if cache is None:
            return outputs
        if prefix_length is not None:
            outputs = only_whole_prefixes(
                self.name, outputs, prefix_length, cache_update_index
            )
        new = {"latent": computed_after(ops.swapaxes(latent, 1, 2), outputs)}
        cache = self.cache_policy.write(cache, new, cache_update_index, padding_mask)
        return outputs, cache

    def _attend_expanded(
        self, plain: Any, rotary: Any, latent: Any, visibility: Any, training: Any
    ) -> Any:
        """Attends with keys and values of each head."""
        latent_dim, rotary_dim, *_ = self._sizes()
        shared = latent[:, :, 0, :latent_dim]
        key_up, value_up = self._up(shared.dtype)
        key = ops.einsum("blr,hdr->blhd", shared, key_up)
        value = ops.einsum("blr,hrd->blhd", shared, value_up)
        shape = (*ops.shape(rotary)[:3], rotary_dim)
        rotary_key = ops.broadcast_to(latent[..., latent_dim:], shape)
        outputs, _ = self._attend_heads(
            ops.concatenate([plain, rotary], axis=-1),
            (ops.concatenate([key, rotary_key], axis=-1), value),
            visibility,
            training=training,
        )
        return outputs

    def _attend_absorbed(
        self,
        plain: Any,
        rotary: Any,
        past: Any,
        latent: Any,
        visibility: Any,
        training: Any,
    ) -> Any:
        """Attends to latents as they are: one key/value head for all queries."""
        key_up, _ = self._up(plain.dtype)
        projected = ops.einsum("blhd,hdr->blhr", plain, key_up)
        found, _ = self._attend_heads(
            ops.concatenate([projected, rotary], axis=-1),
            (latent, latent),
            visibility,
            (TokensFirst(past), past),
            training=training,
        )
        # What the values are without came along: cutting the past would copy it.
        found = found[..., : self._sizes()[0]]
        # Keras multiplies float64 in float32 on torch.
        _, value_up = self._up(found.dtype)
        return ops.einsum("blhr,hrd->blhd", found, value_up)

    def _up(self, dtype: Any) -> tuple[Any, Any]:
        """What makes of a latent the keys and the values of all heads."""
        return ops.cast(self.key_up, dtype), ops.cast(self.value_up, dtype)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        # One key/value head for all, or one for each: this layer has no choice.
        for name in ("num_key_value_heads", "query_key_norm"):
            del config[name]
        config.update(
            latent_dim=self.latent_dim,
            rotary_dim=self.rotary_dim,
            query_latent_dim=self.query_latent_dim,
            epsilon=self.epsilon,
            cache_dtype=self.cache_dtype,
        )
        return config
