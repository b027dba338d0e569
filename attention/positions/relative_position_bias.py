"""The relative position bias of T5."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import arguments_of, check_positive_int
from attention.contract.roles import declare_axes
from attention.contract.types import Initializer, Tensor
from attention.positions.position_scheme import PositionScheme


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RelativePositionBias(PositionScheme):
    """Adds to each logit a trained bias of its relative position, as in T5.

    Small distances have a bucket each, larger ones share buckets that widen
    logarithmically, and all beyond `max_distance` share the last.

    Args:
        num_buckets: int. The number of buckets. Defaults to `32`.
        max_distance: int. The distance from which on all share one bucket.
        bidirectional: bool. Whether half of the buckets are for keys after the query.
        embeddings_initializer: initializer of the biases.

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
        embeddings_initializer: Initializer = "random_normal",
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
        declare_axes(self, {"embeddings": (None, "heads")})
        # Added to float32 logits, whatever the layer computes in.
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.num_buckets, num_heads),
            initializer=self.embeddings_initializer,
            autocast=False,
        )

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        # (..., query_length, key_length)
        relative = key_positions[..., None, :] - query_positions[..., :, None]
        buckets = self.bucket(relative)
        embeddings = ops.cast(ops.convert_to_tensor(self.embeddings), "float32")
        # Heads come last in the table, and before the lengths in a bias.
        return ops.moveaxis(ops.take(embeddings, buckets, axis=0), -1, -3)

    def bucket(self, relative_positions: Tensor) -> Tensor:
        """Returns the `int32` bucket of each `key position - query position`."""
        buckets, offset = self.num_buckets, 0
        if self.bidirectional:
            buckets //= 2
            offset = ops.where(relative_positions > 0, buckets, 0)
            distance = ops.abs(relative_positions)
        else:
            distance = ops.maximum(-relative_positions, 0)
        # A table, as logarithms differ between devices.
        table = _distance_buckets(buckets, self.max_distance)
        distance = ops.minimum(distance, self.max_distance)
        return ops.take(ops.convert_to_tensor(table), distance, axis=0) + offset

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(RelativePositionBias, self), **super().get_config()}


def _distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each distance from 0 to `max_distance`."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype("float32") / exact)
    ratio = ratio / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * (num_buckets - exact)).astype("int32")
    far = np.minimum(far, num_buckets - 1)
    return np.where(distance < exact, distance, far).astype("int32")
