"""Sinusoidal position encodings."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import arguments_of, check_number
from attention.contract.checks import check_sequence_shape
from attention.contract.types import Shape, Tensor
from attention.positions.position_embedding import PositionVectors


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class SinusoidalPositions(PositionVectors):
    """Sines and cosines of each position, which have no weights and no last position.

    Feature `i` of the first half of the width is `sin(position / max_wavelength **
    (2 * i / width))`, and that of the second half is the cosine.

    Args:
        max_wavelength: float. The wavelength towards which those of the features grow.
        interleaved: bool. Whether sines and cosines alternate, as in the paper, rather
            than fill a half each, as in Marian and Pegasus.
        **kwargs: arguments of `attention.CachedLayer`, such as `name` and `sequence`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`. Only its shape matters.
        padding_mask: makes no difference.
        cache: `None` or `()`.
        cache_update_index: as for every `CachedLayer`.
        segment_ids: `None` or integer tensor `(batch, length)`: positions count from the
            start of each document.

    Returns:
        A tensor of shape `(batch, length, width)`, in the compute dtype; with a cache,
        `(outputs, ())`.

    Raises:
        ValueError: if the width is odd.

    Example:

    >>> import numpy as np
    >>> from attention import SinusoidalPositions
    >>> encoded = SinusoidalPositions()(np.zeros((1, 3, 4)))
    >>> [round(float(x), 3) for x in encoded[0, 1]]
    [0.841, 0.01, 0.54, 1.0]

    Reference:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    def __init__(
        self, max_wavelength: float = 10000.0, interleaved: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.max_wavelength: Any = check_number("max_wavelength", max_wavelength)
        self.interleaved = bool(interleaved)

    def build(self, inputs_shape: Shape) -> None:
        width = check_sequence_shape(self.name, inputs_shape)
        if width % 2:
            raise ValueError(
                f"Layer '{self.name}' needs inputs of an even width, as each wavelength "
                f"has a sine and a cosine. Received: inputs of shape {inputs_shape}"
            )
        exponents = np.arange(width // 2) * 2 / width
        self._frequencies = (self.max_wavelength**-exponents).astype("float32")

    def vectors(self, positions: Tensor) -> Tensor:
        angles = ops.cast(positions, "float32")[..., None] * self._frequencies
        parts = (ops.sin(angles), ops.cos(angles))
        if self.interleaved:
            found = ops.stack(parts, axis=-1)
            found = ops.reshape(found, (*ops.shape(angles)[:-1], -1))
        else:
            found = ops.concatenate(parts, axis=-1)
        return ops.cast(found, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(SinusoidalPositions, self), **super().get_config()}
