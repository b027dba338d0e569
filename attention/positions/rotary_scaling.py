"""Frequencies of rotary embeddings, and their scaling for longer contexts."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from attention.contract.arguments import describe


def rotary_frequencies(
    dim: int, max_wavelength: float, scaling: dict[str, Any] | None = None
) -> tuple[np.ndarray, float]:
    """Returns the angle per position of each rotated pair.

    Args:
        dim: int. The number of dimensions that are rotated; even.
        max_wavelength: number. The base, also called `rope_theta`.
        scaling: `None` or a dict; see `attention.RotaryPosition`.

    Returns:
        A `float32` array of shape `(dim // 2,)`, and the factor of sines and cosines,
        which is 1 except for YaRN.

    Raises:
        ValueError: if an argument is out of range or `scaling` lacks a key.
        TypeError: if `scaling` is no dict.

    Example:

    >>> from attention.positions.rotary_scaling import rotary_frequencies
    >>> frequencies, magnitude = rotary_frequencies(4, 10_000)
    >>> [round(float(f), 4) for f in frequencies], magnitude
    ([1.0, 0.01], 1.0)
    """
    if dim % 2:
        raise ValueError(
            "Rotary positions rotate pairs of dimensions, so the size of a head "
            f"must be even. Received: key_dim={dim}"
        )
    if not _is_positive(max_wavelength) or max_wavelength == 1:
        raise ValueError(
            "`max_wavelength` must be a positive number other than 1. Received: "
            f"max_wavelength={describe(max_wavelength)}"
        )
    frequencies = float(max_wavelength) ** (-np.arange(0, dim, 2) / dim)
    magnitude = 1.0
    if scaling is not None:
        if not isinstance(scaling, dict):
            raise TypeError(
                "`scaling` must be None or a dict such as "
                '{"rope_type": "linear", "factor": 2.0}. Received: '
                f"scaling={describe(scaling)}"
            )
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind not in _SCALINGS:
            raise ValueError(
                f'`scaling["rope_type"]` must be one of {sorted(_SCALINGS)}. '
                f"Received: scaling={describe(scaling)}"
            )
        required = _SCALINGS[kind][1]
        given = [k for k in _OPTIONAL_NUMBERS if scaling.get(k) is not None]
        wrong = [k for k in (*required, *given) if not _is_positive(scaling.get(k))]
        if wrong:
            raise ValueError(
                f"`scaling` of type {kind!r} needs positive numbers for {wrong}. "
                f"Received: scaling={describe(scaling)}"
            )
        scale = _SCALINGS[kind][0]
        frequencies, magnitude = scale(frequencies, max_wavelength, scaling)
    return frequencies.astype("float32"), magnitude


def _is_positive(x: Any) -> bool:
    return isinstance(x, numbers.Real) and 0 < float(x) < math.inf


def _linear(
    frequencies: np.ndarray, max_wavelength: float, scaling: dict[str, Any]
) -> tuple[np.ndarray, float]:
    return frequencies / scaling["factor"], 1.0


def _llama3(
    frequencies: np.ndarray, max_wavelength: float, scaling: dict[str, Any]
) -> tuple[np.ndarray, float]:
    """Stretches long wavelengths, keeps short ones, blends those in between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if high <= low:
        raise ValueError(
            '`scaling["high_freq_factor"]` must be larger than '
            f'`scaling["low_freq_factor"]`. Received: scaling={describe(scaling)}'
        )
    wavelengths = 2 * math.pi / frequencies
    rotations = scaling["original_max_position_embeddings"] / wavelengths
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling["factor"]), 1.0


def _yarn(
    frequencies: np.ndarray, max_wavelength: float, scaling: dict[str, Any]
) -> tuple[np.ndarray, float]:
    """Blends by the number of rotations, and sharpens the attention weights."""
    factor = scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    dim = 2 * len(frequencies)

    def pair_of(rotations: float) -> float:
        """Returns the (fractional) pair that turns this often within the context."""
        wavelength = original / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(max_wavelength))

    low = pair_of(scaling.get("beta_fast") or 32)
    high = pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2) - low) / max(high - low, 0.001)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        magnitude = _yarn_magnitude(factor, scaling)
    return frequencies * (keep + (1 - keep) / factor), float(magnitude)


def _yarn_magnitude(factor: float, scaling: dict[str, Any]) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if above and below:
        return magnitude(above) / magnitude(below)
    return magnitude(1.0)


_SCALINGS = {
    "linear": (_linear, ("factor",)),
    "llama3": (
        _llama3,
        (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    ),
    "yarn": (_yarn, ("factor", "original_max_position_embeddings")),
}
_OPTIONAL_NUMBERS = ("beta_fast", "beta_slow", "attention_factor")
