"""The beginning of a model of audio."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract import Shape, Tensor, declare_axes

# The sizes and strides of the convolutions.
_CONVOLUTIONS = ((127, 64), (7, 3), (3, 2))


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class AudioStem(keras.layers.Layer):
    """Makes vectors of audio, by three convolutions with a norm after the first.

    Args:
        hidden_dim: int. The width of the vectors.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        audio: tensor of shape `(batch, samples)`.
        padding_mask: tensor of shape `(batch, samples)`: the real ones.

    Returns:
        The vectors, `(batch, length, hidden_dim)`, and the mask of those of which all
        samples are real, `(batch, length)`.

    Example:

    >>> import numpy as np
    >>> from blocks.layers.audio_stem import AudioStem
    >>> audio = np.zeros((1, 2000), "float32")
    >>> x, mask = AudioStem(hidden_dim=16)(audio, np.ones((1, 2000)))
    >>> x.shape == (1, 3, 16) and mask.shape == (1, 3)
    True

    Reference:

    - [Jeffries et al., 2024](https://arxiv.org/abs/2410.15608)
    """

    def __init__(self, hidden_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim

    def build(self, audio_shape: Shape, padding_mask_shape: Shape) -> None:
        widths = [1, self.hidden_dim, 2 * self.hidden_dim, self.hidden_dim]
        self.convolutions = []
        for i, (size, strides) in enumerate(_CONVOLUTIONS):
            conv: Any = keras.layers.Conv1D(
                widths[i + 1],
                size,
                strides,
                use_bias=i > 0,
                dtype=self.dtype_policy,
                name=f"conv_{i + 1}",
            )
            conv.build((None, None, widths[i]))
            declare_axes(conv, {"kernel": (None, None, None)})
            self.convolutions.append(conv)
        shape = (self.hidden_dim,)
        self.scale = self.add_weight(shape, "ones", name="scale", autocast=False)
        self.bias = self.add_weight(shape, "zeros", name="bias", autocast=False)

    def call(self, audio: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = audio[..., None], padding_mask
        lengths = ops.sum(ops.cast(padding_mask, "int32"), axis=1)
        for i, conv in enumerate(self.convolutions):
            size, strides = _CONVOLUTIONS[i]
            x, lengths = conv(x), (lengths - size) // strides + 1
            mask = ops.arange(ops.shape(x)[1]) < lengths[:, None]
            x = keras.activations.gelu(x) if i else self.normalize(ops.tanh(x), mask)
        return x, mask

    def normalize(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns vectors of which all numbers of a row are normalized together."""
        y, real = ops.cast(x, "float32"), ops.cast(mask, "float32")[..., None]
        count = ops.maximum(ops.sum(real, axis=1, keepdims=True), 1) * self.hidden_dim
        y = y - ops.sum(y * real, axis=(1, 2), keepdims=True) / count
        variance = ops.sum(ops.square(y) * real, axis=(1, 2), keepdims=True) / count
        y = y * ops.rsqrt(variance + 1e-5) * self.scale + self.bias
        return ops.cast(y, x.dtype)

    def compute_output_spec(self, audio: Tensor, padding_mask: Tensor) -> Any:
        # Unknown lengths are traced as some that are too short.
        shape = (audio.shape[0], None, self.hidden_dim)
        mask = keras.KerasTensor(shape[:2], dtype="bool")
        return keras.KerasTensor(shape, dtype=self.compute_dtype), mask

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "hidden_dim": self.hidden_dim}
