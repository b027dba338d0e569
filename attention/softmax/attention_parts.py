"""The arguments, weights and projections of attention layers."""

from __future__ import annotations

from typing import Any

import keras

from attention.caches.cache_policy import CachePolicy, check_cache_policy
from attention.caches.full_cache import FullCache
from attention.caches.quantized_cache import QuantizedCache
from attention.caches.ring_cache import RingCache
from attention.contract.arguments import (
    arguments_of,
    check_fraction,
    check_number,
    check_optional_positive_int,
    check_positive_int,
    describe,
)
from attention.contract.cached_layer import CachedLayer
from attention.contract.checks import check_sequence_shape
from attention.contract.inner_layers import clone_initializer, make_rms_norm
from attention.contract.roles import ROLES, declare_axes, declare_role
from attention.contract.sizes import static_size
from attention.contract.types import Cache, Initializer, Tensor
from attention.positions.position_scheme import (
    PositionScheme,
    check_position,
    serialize_position,
)
from attention.softmax.heads_dense import HeadsDense


class AttentionParts(CachedLayer):
    """The arguments of `GroupedQueryAttention`, and the parts that they ask for."""

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        position: PositionScheme | None = None,
        causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        kernel_initializer: Initializer = "glorot_uniform",
        bias_initializer: Initializer = "zeros",
        query_key_norm: bool = False,
        logit_soft_cap: float | None = None,
        attention_sinks: bool = False,
        output_gate: bool = False,
        cache_dtype: str | None = None,
        cache_policy: CachePolicy | None = None,
        output_bias: bool | None = None,
        norm_epsilon: float = 1e-6,
        key_bias: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self._set_sizes(num_key_value_heads=num_key_value_heads, window=window)
        self._set_sizes(key_dim=key_dim, value_dim=value_dim)
        if num_key_value_heads is not None and num_heads % num_key_value_heads:
            raise ValueError(
                "`num_heads` must be divisible by `num_key_value_heads`, so that "
                "each key/value head serves as many query heads. Received: "
                f"num_heads={num_heads}, num_key_value_heads={num_key_value_heads}"
            )
        self.dropout = check_fraction("dropout", dropout)
        self.use_bias = bool(use_bias)
        self.position = check_position(position)
        # Whether a query attends to no later position.
        self.causal = bool(causal)
        self.scale = check_number("scale", scale, none="1 / sqrt(key_dim)")
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.query_key_norm = bool(query_key_norm)
        cap = check_number("logit_soft_cap", logit_soft_cap, none="no cap")
        if cap is not None and cap <= 0:
            raise ValueError(
                "`logit_soft_cap` must be positive: logits are kept between it and its "
                f"negative. Received: logit_soft_cap={logit_soft_cap}"
            )
        self.logit_soft_cap = cap
        self.output_bias = output_bias
        self.key_bias = key_bias
        self.norm_epsilon = norm_epsilon
        self.attention_sinks = bool(attention_sinks)
        self.output_gate = bool(output_gate)
        self.cache_dtype = cache_dtype
        policy = check_cache_policy(cache_policy, window, cache_dtype)
        self._given_policy = policy
        if policy is None:
            policy = FullCache() if window is None else RingCache(window)
            policy = policy if cache_dtype is None else QuantizedCache(policy)
        self.cache_policy = policy
        # Made by `build` if needed.
        self.query_norm = self.key_norm = self.sinks = self.gate_dense = None
        self.dropout_layer = None

    def _set_sizes(self, **sizes: Any) -> None:
        for name, size in sizes.items():
            setattr(self, name, check_optional_positive_int(name, size))

    # How many query heads of size `key_dim` each head has.
    _per_head = 1

    def _check_width(self, query_shape: tuple) -> None:
        """Records the width of the inputs, and checks that it fits the heads."""
        self._width = check_sequence_shape(self.name, query_shape)
        if self.key_dim is None and self._width % (self._per_head * self.num_heads):
            divisor = "num_heads" if self._per_head == 1 else "2 * num_heads"
            raise ValueError(
                f"With `key_dim=None`, the width of the inputs of layer "
                f"'{self.name}' must be divisible by `{divisor}`. Received: "
                f"num_heads={self.num_heads}, inputs of shape "
                f"{tuple(query_shape)}. Pass `key_dim`, or another `num_heads`."
            )

    def head_dims(self) -> tuple[int, int]:
        """Returns the sizes of a key head and of a value head, as they are attended."""
        key_dim = self.key_dim or self._width // self.num_heads
        return key_dim, self.value_dim or key_dim

    def query_heads(self) -> tuple[int, int]:
        """Returns the number and the size of the query heads that are projected."""
        return self.num_heads, self.head_dims()[0]

    def make_projection(
        self, name: str, heads: tuple[int, int], inputs_shape: tuple
    ) -> keras.layers.Layer:
        """Makes a projection of inputs to `heads`, a pair `(heads, dim)`, in `build`.

        Returns a layer that returns tensors of shape `(batch, length, heads, dim)` for
        inputs of shape `(batch, length, width)`.
        """
        use_bias = self.use_bias
        if name == "key" and self.key_bias is not None:
            use_bias = self.key_bias
        dense = HeadsDense(
            "blw,whd->blhd",
            output_shape=(None, *heads),
            bias_axes="hd" if use_bias else None,
            name=name,
            **self._initializers(),
        )
        dense.build(inputs_shape)
        declare_axes(dense, {"kernel": (None, "heads", None), "bias": ("heads", None)})
        role = "gate" if name == "output_gate" else name
        return declare_role(dense, role) if role in ROLES else dense

    def build_output(self, query_shape: tuple) -> None:
        """Makes the parts after the queries: dropout, bias, output projection."""
        value_dim = self.head_dims()[1]
        heads, key_dim = self.query_heads()
        self._logit_scale = key_dim**-0.5 if self.scale is None else self.scale
        use_bias = self.use_bias if self.output_bias is None else self.output_bias
        # Letters of contracted axes are in alphabetical order: JAX sorts them, and would
        # otherwise transpose the kernel in every decode step.
        self.output_dense = HeadsDense(
            "bqhk,hkw->bqw",
            output_shape=(None, query_shape[-1]),
            bias_axes="w" if use_bias else None,
            name="attention_output",
            **self._initializers(),
        )
        self.output_dense.build((*query_shape[:2], self.num_heads, value_dim))
        declare_role(self.output_dense, "output")
        if self.dropout:
            self.dropout_layer = keras.layers.Dropout(
                self.dropout, dtype=self.dtype_policy, name="attention_dropout"
            )
        if self.position is not None:
            self.position.build_for_layer(heads)
        if self.output_gate:
            gates = (self.num_heads, value_dim)
            self.gate_dense = self.make_projection("output_gate", gates, query_shape)
        if self.attention_sinks:
            # They join float32 logits, whatever the layer computes in.
            self.sinks = self.add_weight(
                (heads,), "zeros", name="sinks", autocast=False
            )

    def make_norm(self, name: str) -> keras.layers.Layer | None:
        """Returns a norm of query or key heads, or `None` if there is none."""
        size = self.query_heads()[1]
        if not self.query_key_norm:
            return None
        return make_rms_norm(self, name, size, self.norm_epsilon)

    def project_query(self, query: Tensor) -> Tensor:
        """Returns heads of queries, `(batch, length, num_heads, key_dim)`."""
        query = self.query_dense(query)
        return query if self.query_norm is None else self.query_norm(query)

    def _initializers(self) -> dict[str, Any]:
        # A shared random initializer with a seed would give all kernels equal values.
        return {
            "kernel_initializer": clone_initializer(self.kernel_initializer),
            "bias_initializer": clone_initializer(self.bias_initializer),
            "dtype": self.dtype_policy,
        }

    def _bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Returns the bias of the position scheme, if there is one."""
        if self.position is None:
            return None
        bias = self.position.bias(query_positions, key_positions)
        found, heads = None if bias is None else bias.shape[-3], self.query_heads()[0]
        if found not in (None, 1, heads):
            raise ValueError(
                f"`position` of layer '{self.name}' gave biases for {found} heads, "
                f"but the layer has num_heads={heads}. Layers that share "
                "a position scheme need the same number of heads."
            )
        return bias

    def _check_cached_call(
        self, cache: Cache, index: Tensor, segment_ids: Tensor
    ) -> None:
        """Raises an error if a call with a cache lacks something, or has too much."""
        if cache is None:
            return
        if index is None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` but without "
                "`cache_update_index`, which would only read the cache; but "
                "the positions of the queries are not known then. Pass the "
                "number of positions that the cache holds."
            )
        if segment_ids is not None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` and `segment_ids`. A "
                "cache holds one document in each row; give each its own row."
            )

    def _check_sources(self, value: Tensor, key: Tensor, cache: Cache) -> None:
        """Raises an error if `value` and `key` do not fit each other or a cache."""
        lengths = {static_size(x, 1) for x in (value, key) if x is not None}
        if len(lengths - {None}) > 1:
            raise ValueError(
                f"Layer '{self.name}' needs as many keys as values. Received: "
                f"value={describe(value)}, key={describe(key)}"
            )
        if cache is not None and (value is not None or key is not None):
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` and with "
                "`value` or `key`. Its cache holds the sequence it attends "
                "to: pass the new tokens as `query` alone. Received: value="
                f"{describe(value)}, key={describe(key)}"
            )

    def get_config(self) -> dict[str, Any]:
        config = {**arguments_of(AttentionParts, self), **super().get_config()}
        config["position"] = serialize_position(self.position)
        del config["cache_policy"]
        if self._given_policy is not None:
            policy = keras.saving.serialize_keras_object(self._given_policy)
            config["cache_policy"] = policy
        return config
