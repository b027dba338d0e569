"""Rotary position embeddings (RoPE)."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import arguments_of, check_optional_positive_int
from attention.contract.types import DType, Tensor
from attention.positions.position_scheme import PositionScheme
from attention.positions.rotary_scaling import rotary_frequencies


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class RotaryPosition(PositionScheme):
    """Rotates queries and keys by their positions: rotary embeddings, or RoPE.

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
        rotary_dim: even int or `None`. How many of a head's first dimensions are
            rotated, as in GPT-NeoX and Phi; `None` means all.

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
        self.rotary_dim = check_optional_positive_int("rotary_dim", rotary_dim)
        self.max_wavelength = max_wavelength
        # Raises early for arguments that are wrong for every size of heads.
        rotary_frequencies(rotary_dim or 2, max_wavelength, scaling)
        # Keras would take a dict for a structure of sublayers.
        self._scaling = None if scaling is None else tuple(scaling.items())

    @property
    def scaling(self) -> dict[str, Any] | None:
        """The scaling, as a dict, or `None`."""
        return None if self._scaling is None else dict(self._scaling)

    def encode(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = self.rotary_dim or query.shape[-1]
        if size > query.shape[-1]:
            raise ValueError(
                f"`rotary_dim` must be at most the size of a head. Received: rotary_dim="
                f"{size}, heads of size {query.shape[-1]}"
            )
        frequencies, magnitude = rotary_frequencies(
            size, self.max_wavelength, self.scaling
        )
        turns = _cos_sin(query_positions, frequencies, magnitude, query.dtype)
        rotated = _rotate(query, *turns)
        if key_positions is not query_positions:
            turns = _cos_sin(key_positions, frequencies, magnitude, key.dtype)
        return rotated, _rotate(key, *turns)

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(RotaryPosition, self), **super().get_config()}


def _cos_sin(
    positions: Tensor, frequencies: np.ndarray, magnitude: float, dtype: DType
) -> tuple[Tensor, Tensor]:
    """Returns factors of shape `(length, 1, pairs)` or `(batch, length, 1, pairs)`."""
    # Angles of positions in the thousands need float32.
    positions = ops.cast(positions, "float32")[..., None, None]
    angles = positions * ops.convert_to_tensor(frequencies)
    found = (ops.cos(angles) * magnitude, ops.sin(angles) * magnitude)
    return ops.cast(found[0], dtype), ops.cast(found[1], dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads, `(batch, length, heads, dim)`."""
    x, half = ops.convert_to_tensor(x), cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return ops.concatenate(parts, axis=-1)
