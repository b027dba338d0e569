"""The biases of attention with linear biases (ALiBi)."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from attention.contract.types import Tensor
from attention.positions.position_scheme import PositionScheme


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class AlibiBias(PositionScheme):
    """Lowers the logit of a key in proportion to its distance from the query.

    Each head has a slope of its own, a power of two that is not trained.

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
        # A geometric sequence; heads beyond a power of two fall in between.
        power = 2 ** int(math.log2(num_heads))
        slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
        slopes += [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * power, 2)]
        self.slopes = np.array(slopes[:num_heads], dtype="float32")

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        # (..., query_length, key_length), and with heads before these two
        relative = key_positions[..., None, :] - query_positions[..., :, None]
        distance = ops.expand_dims(ops.cast(ops.abs(relative), "float32"), -3)
        return -distance * ops.convert_to_tensor(self.slopes[:, None, None])
