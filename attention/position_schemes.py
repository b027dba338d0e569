"""Position schemes: how attention knows which token comes where."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from attention.rotary_scaling import rotary_frequencies
from attention.validation import check_positive_int, describe


class PositionScheme(keras.layers.Layer):
    """How an attention layer knows the positions of queries and keys.

    A scheme changes queries and keys (`encode`), or adds a bias to the
    attention logits (`bias`), or both. It computes from positions alone, never
    from lengths or cache shapes: it is the same in training, in prefill and in
    decoding, with rows at different positions.

    It is a Keras layer so that it can hold weights and be saved; an attention
    layer that holds it builds it. Several attention layers may share one.

    Example:

    A bias that only knows whether two positions are equal.

    >>> import keras, numpy as np
    >>> from keras import ops
    >>> from attention import MultiHeadAttention, PositionScheme
    >>> class SelfBias(PositionScheme):
    ...     def bias(self, query_positions, key_positions):
    ...         same = query_positions[..., :, None] == key_positions[..., None, :]
    ...         return ops.expand_dims(ops.cast(same, "float32"), -3)
    >>> layer = MultiHeadAttention(num_heads=2, position=SelfBias())
    >>> layer(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # How many attention layers hold this scheme; they share its weights.
        self.num_layers = 0

    def build(self, num_heads: int) -> None:
        """Creates weights, if any, for this number of query heads."""

    def encode(
        self, query: Any, key: Any, query_positions: Any, key_positions: Any
    ) -> tuple[Any, Any]:
        """Encodes positions into queries and keys.

        Args:
            query: tensor of shape `(batch, query_length, num_heads, key_dim)`.
            key: tensor of shape `(batch, key_length, num_key_value_heads,
                key_dim)`: the new keys only, those in the cache are encoded.
            query_positions: `int32` tensor, `(query_length,)` or `(batch,
                query_length)`.
            key_positions: likewise for the keys.

        Returns:
            The encoded `(query, key)`.
        """
        return query, key

    def bias(self, query_positions: Any, key_positions: Any) -> Any:
        """Computes what is added to the attention logits.

        Args:
            query_positions: `int32` tensor, `(query_length,)` or `(batch,
                query_length)`.
            key_positions: likewise for all keys, also those in the cache.

        Returns:
            `None`, or a `float32` tensor of shape `(num_heads, query_length,
            key_length)`, with a batch axis in front where positions have one.
            A heads axis of 1 serves all heads.
        """
        return None

    def get_build_config(self) -> None:
        """The attention layer that holds a scheme builds it."""


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RotaryPosition(PositionScheme):
    """Rotary position embedding: rotates queries and keys by their positions.

    The dimensions of a head are rotated in pairs `(i, i + key_dim / 2)`, as in
    Llama, GPT-NeoX and KerasHub's `RotaryEmbedding`.

    Args:
        max_wavelength: number. The longest wavelength, also called the base or
            `rope_theta`. Defaults to `10_000`.
        scaling: `None` or a dict that stretches the wavelengths for contexts
            longer than those of pre-training, with the key names of a
            transformers configuration's `rope_scaling`:
            `{"rope_type": "linear", "factor": ...}`;
            `{"rope_type": "llama3", "factor": ..., "low_freq_factor": ...,
            "high_freq_factor": ..., "original_max_position_embeddings": ...}`;
            `{"rope_type": "yarn", "factor": ...,
            "original_max_position_embeddings": ..., "beta_fast": 32,
            "beta_slow": 1, "attention_factor": None}`.
        rotary_dim: even int or `None`. Only so many dimensions at the head's
            front are rotated, as in GPT-NeoX and Phi; `None` means all.

    Raises:
        ValueError: if `max_wavelength` is not positive, `scaling` is of an
            unknown type or lacks a key, or the head size is odd.

    Example:

    >>> import numpy as np
    >>> from attention import GroupedQueryAttention, RotaryPosition
    >>> layer = GroupedQueryAttention(
    ...     num_heads=4,
    ...     num_key_value_heads=2,
    ...     position=RotaryPosition(scaling={"rope_type": "linear", "factor": 2.0}),
    ... )
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True

    References:

    - [Su et al., 2021](https://arxiv.org/abs/2104.09864)
    - [Chen et al., 2023](https://arxiv.org/abs/2306.15595) (linear)
    - [Peng et al., 2023](https://arxiv.org/abs/2309.00071) (YaRN)
    - [Llama 3, 2024](https://arxiv.org/abs/2407.21783)
    """

    def __init__(
        self,
        max_wavelength: float = 10_000,
        scaling: dict[str, Any] | None = None,
        rotary_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rotary_dim = (
            None if rotary_dim is None else check_positive_int("rotary_dim", rotary_dim)
        )
        self.max_wavelength = max_wavelength
        # An early error for arguments no head size could make right.
        rotary_frequencies(rotary_dim or 2, max_wavelength, scaling)
        # Keras would take a dict for a structure of sublayers.
        self._scaling = None if scaling is None else tuple(scaling.items())

    @property
    def scaling(self) -> dict[str, Any] | None:
        """The scaling, as a dict, or `None`."""
        return None if self._scaling is None else dict(self._scaling)

    def encode(
        self, query: Any, key: Any, query_positions: Any, key_positions: Any
    ) -> tuple[Any, Any]:
        size = self.rotary_dim or query.shape[-1]
        if size > query.shape[-1]:
            raise ValueError(
                f"`rotary_dim` must be at most the size of a head. Received: rotary_dim="
                f"{size}, heads of size {query.shape[-1]}"
            )
        frequencies, magnitude = rotary_frequencies(
            size, self.max_wavelength, self.scaling
        )
        rotated = _rotate(query, query_positions, frequencies, magnitude)
        return rotated, _rotate(key, key_positions, frequencies, magnitude)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            max_wavelength=self.max_wavelength,
            scaling=self.scaling,
            rotary_dim=self.rotary_dim,
        )
        return config


def _rotate(x: Any, positions: Any, frequencies: np.ndarray, magnitude: float) -> Any:
    """Rotates `(batch, length, heads, dim)` by `(length,)` or `(batch, length)`."""
    # Angles of positions in the thousands need float32.
    frequencies = ops.convert_to_tensor(frequencies)
    angles = ops.cast(positions, "float32")[..., None] * frequencies
    angles = angles[..., None, :]
    cos = ops.cast(ops.cos(angles) * magnitude, x.dtype)
    sin = ops.cast(ops.sin(angles) * magnitude, x.dtype)
    x, half = ops.convert_to_tensor(x), frequencies.shape[0]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return ops.concatenate(parts, axis=-1)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RelativePositionBias(PositionScheme):
    """T5's trainable bias for buckets of relative positions.

    Near distances have a bucket each, farther ones share buckets whose width
    grows logarithmically, and all beyond `max_distance` share the last.

    Args:
        num_buckets: int. The number of buckets. Defaults to `32`.
        max_distance: int. The distance from which on all share one bucket.
            Defaults to `128`.
        bidirectional: bool. Whether half of the buckets are for keys that come
            after the query. Defaults to `False`.
        embeddings_initializer: initializer of the biases. Defaults to
            `"random_normal"`.

    Raises:
        ValueError: if a bucket would be empty.

    Example:

    >>> import numpy as np
    >>> from attention import MultiHeadAttention, RelativePositionBias
    >>> layer = MultiHeadAttention(num_heads=2, position=RelativePositionBias())
    >>> layer(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True
    >>> tuple(layer.position.embeddings.shape)  # (num_buckets, num_heads)
    (32, 2)

    Reference:

    - [Raffel et al., 2019](https://arxiv.org/abs/1910.10683)
    """

    def __init__(
        self,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
        embeddings_initializer: Any = "random_normal",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_buckets = check_positive_int("num_buckets", num_buckets)
        self.max_distance = check_positive_int("max_distance", max_distance)
        self.bidirectional = bool(bidirectional)
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        exact = num_buckets // (4 if bidirectional else 2)
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"`num_buckets={num_buckets}` leaves {exact} buckets for single "
                "distances; it must leave at least 1, and `max_distance` must be "
                f"larger. Received: max_distance={max_distance}, "
                f"bidirectional={bidirectional}"
            )

    def build(self, num_heads: int) -> None:
        # Added to float32 logits, whatever the layer computes in.
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.num_buckets, num_heads),
            initializer=self.embeddings_initializer,
            autocast=False,
        )

    def bias(self, query_positions: Any, key_positions: Any) -> Any:
        relative = key_positions[..., None, :] - query_positions[..., :, None]
        buckets = self.bucket(relative)
        embeddings = ops.cast(ops.convert_to_tensor(self.embeddings), "float32")
        return ops.moveaxis(ops.take(embeddings, buckets, axis=0), -1, -3)

    def bucket(self, relative_positions: Any) -> Any:
        """Returns the bucket of each `key position - query position`.

        Args:
            relative_positions: integer tensor of any shape.

        Returns:
            An `int32` tensor of the same shape, in `[0, num_buckets)`.
        """
        buckets = self.num_buckets
        offset = 0
        if self.bidirectional:
            buckets //= 2
            offset = ops.where(relative_positions > 0, buckets, 0)
            distance = ops.abs(relative_positions)
        else:
            distance = ops.maximum(-relative_positions, 0)
        # A table made here is the same on every device; logarithms are not.
        table = _distance_buckets(buckets, self.max_distance)
        distance = ops.minimum(distance, self.max_distance)
        return ops.take(ops.convert_to_tensor(table), distance, axis=0) + offset

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
            embeddings_initializer=keras.initializers.serialize(
                self.embeddings_initializer
            ),
        )
        return config


def _distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance from 0 to `max_distance`."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype("float32") / exact)
    ratio = ratio / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * (num_buckets - exact)).astype("int32")
    far = np.minimum(far, num_buckets - 1)
    return np.where(distance < exact, distance, far).astype("int32")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class AlibiBias(PositionScheme):
    """Attention with linear biases: the farther a key, the lower its logit.

    Each head has its own slope, a power of two that is not trained.

    Example:

    >>> import numpy as np
    >>> from attention import AlibiBias, MultiHeadAttention
    >>> layer = MultiHeadAttention(num_heads=8, position=AlibiBias())
    >>> layer(np.zeros((1, 3, 16))).shape == (1, 3, 16)
    True
    >>> layer.position.slopes[:2].tolist()
    [0.5, 0.25]

    Reference:

    - [Press et al., 2021](https://arxiv.org/abs/2108.12409)
    """

    def build(self, num_heads: int) -> None:
        self.slopes = _alibi_slopes(num_heads)

    def bias(self, query_positions: Any, key_positions: Any) -> Any:
        relative = key_positions[..., None, :] - query_positions[..., :, None]
        distance = ops.expand_dims(ops.cast(ops.abs(relative), "float32"), -3)
        return -distance * ops.convert_to_tensor(self.slopes[:, None, None])


def _alibi_slopes(num_heads: int) -> np.ndarray:
    """A geometric sequence; heads beyond a power of two fall in between."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return np.array((slopes + between)[:num_heads], dtype="float32")


def serialize_position(position: PositionScheme | None) -> dict[str, Any] | None:
    """The configuration of a scheme, marked where several layers hold it.

    Keras shares an object of a file again when it finds this mark. It makes it
    by itself for objects that are found again in the same structure, but not
    for those that a `get_config` has serialized already.
    """
    config = keras.saving.serialize_keras_object(position)
    if position is not None and position.num_layers > 1:
        config["shared_object_id"] = id(position)
    return config


def check_position(position: Any) -> PositionScheme | None:
    """Returns `position`, or says what may be given for it."""
    if isinstance(position, dict):
        position = keras.saving.deserialize_keras_object(position)
    if position is not None and not isinstance(position, PositionScheme):
        raise TypeError(
            "`position` must be None or a position scheme: `RotaryPosition`, "
            "`RelativePositionBias`, `AlibiBias` or another subclass of "
            f"`PositionScheme`. Received: position={describe(position)}"
        )
    return position
