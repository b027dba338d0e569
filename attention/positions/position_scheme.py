"""The base class of position schemes."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract.arguments import describe
from attention.contract.types import Tensor


class PositionScheme(keras.layers.Layer):
    """Tells an attention layer the positions of queries and keys.

    A scheme changes queries and keys (`encode`), or adds a bias to the
    attention logits (`bias`), or both. It computes from positions alone, never
    from lengths or cache shapes, so that it is the same in training, in prefill and
    in decoding, also where rows are at positions of their own.

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

    # How many attention layers were built with this scheme; they share its weights.
    num_layers = 0

    def build(self, num_heads: int) -> None:
        """Creates weights, if any, for this number of query heads."""

    def build_for_layer(self, num_heads: int) -> None:
        """Builds the scheme for one of the layers that hold it."""
        if not self.built:
            self.build(num_heads)
        self.num_layers += 1

    def encode(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes positions into queries and keys.

        Args:
            query: tensor of shape `(batch, query_length, num_heads, key_dim)`.
            key: tensor of shape `(batch, key_length, num_key_value_heads,
                key_dim)`: the new keys only, those in the cache are encoded.
            query_positions: `int32` tensor of shape `(query_length,)` or `(batch,
                query_length)`.
            key_positions: `int32` tensor `(key_length,)` or `(batch, key_length)`.

        Returns:
            `(query, key)`, encoded, of the shapes received.
        """
        return query, key

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor | None:
        """Returns a bias, which is added to the attention logits.

        Args:
            query_positions: as for `encode`.
            key_positions: those of all keys, also of those in the cache.

        Returns:
            `None`, or a `float32` tensor of shape `(num_heads or 1, query_length,
            key_length)`, preceded by a batch axis where positions have one.
        """
        return None

    def get_build_config(self) -> None:
        """The attention layer that holds a scheme builds it."""


def serialize_position(position: PositionScheme | None) -> dict[str, Any] | None:
    """Returns the configuration of a scheme, marked so that layers share it again.

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
