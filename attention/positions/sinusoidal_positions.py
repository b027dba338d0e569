"""Sinusoidal position encodings."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import arguments_of, check_number
from attention.contract.cached_layer import CachedLayer
from attention.contract.checks import check_sequence_shape
from attention.contract.types import Index, Mask, Shape, Tensor
from attention.positions.arithmetic import token_positions


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class SinusoidalPositions(CachedLayer):
    """Sines and cosines of each position, which have no weights and no last position.

    Feature `i` of the first half of the width is `sin(position / max_wavelength **
    (2 * i / width))`, and that of the second half is the cosine.

    Args:
        max_wavelength: float. The wavelength towards which those of the features grow.
        interleaved: bool. Whether sines and cosines alternate, as in the paper, rather
            than fill a half each, as in Marian, Pegasus and Whisper.
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

    def create_cache(self, batch_size: int, max_length: int) -> tuple:
        return ()

    def call(
        self,
        x: Tensor,
        padding_mask: Mask | None = None,
        cache: tuple | None = None,
        cache_update_index: Index | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, tuple]:
        if cache is not None and cache_update_index is None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` but without "
                "`cache_update_index`, the position of its first token."
            )
        positions = token_positions(cache_update_index, ops.shape(x)[1], segment_ids)
        angles = ops.cast(positions, "float32")[..., None] * self._frequencies
        parts = (ops.sin(angles), ops.cos(angles))
        # (length, width), or (batch, length, width) where rows have their own positions
        if self.interleaved:
            outputs = ops.stack(parts, axis=-1)
            outputs = ops.reshape(outputs, (*ops.shape(angles)[:-1], -1))
        else:
            outputs = ops.concatenate(parts, axis=-1)
        outputs = ops.cast(outputs, self.compute_dtype)
        shape = (ops.shape(x)[0], *ops.shape(outputs)[-2:])
        outputs = ops.broadcast_to(outputs, shape)
        return outputs if cache is None else (outputs, ())

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(SinusoidalPositions, self), **super().get_config()}
