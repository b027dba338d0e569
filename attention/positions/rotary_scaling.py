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
    """Returns the angle per position of each rotated pair, of shape `(dim // 2,)`.

    The second result is the factor of sines and cosines, which is 1 except for YaRN.
    `scaling` is described at `attention.RotaryPosition`.

    Raises:
        ValueError: if an argument is out of range or `scaling` lacks a key.
        TypeError: if `scaling` is no dict.
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
    if scaling is None:
        return frequencies.astype("float32"), 1.0
    received = f"Received: scaling={describe(scaling)}"
    if not isinstance(scaling, dict):
        raise TypeError(
            "`scaling` must be None or a dict such as "
            f'{{"rope_type": "linear", "factor": 2.0}}. {received}'
        )
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _NEEDED:
        raise ValueError(
            f'`scaling["rope_type"]` must be one of {sorted(_NEEDED)}. {received}'
        )
    given = [k for k in _OPTIONAL if scaling.get(k) is not None]
    wrong = [k for k in (*_NEEDED[kind], *given) if not _is_positive(scaling.get(k))]
    if wrong:
        raise ValueError(
            f"`scaling` of type {kind!r} needs positive numbers for {wrong}. {received}"
        )
    magnitude = 1.0
    if kind == "linear":
        keep: Any = 0.0
    elif kind == "llama3":
        keep = _kept_by_llama3(frequencies, scaling)
    else:
        keep = _kept_by_yarn(dim, max_wavelength, scaling)
        magnitude = _yarn_magnitude(scaling)
    frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    return frequencies.astype("float32"), magnitude


def _is_positive(x: Any) -> bool:
    return isinstance(x, numbers.Real) and 0 < float(x) < math.inf


def _kept_by_llama3(frequencies: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Stretches long wavelengths, keeps short ones, blends those in between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if high <= low:
        raise ValueError(
            '`scaling["high_freq_factor"]` must be larger than '
            f'`scaling["low_freq_factor"]`. Received: scaling={describe(scaling)}'
        )
    rotations = scaling[_CONTEXT] * frequencies / (2 * math.pi)
    return np.clip((rotations - low) / (high - low), 0.0, 1.0)


def _kept_by_yarn(
    dim: int, max_wavelength: float, scaling: dict[str, Any]
) -> np.ndarray:
    """Blends by the number of rotations."""

    def pair_of(rotations: float) -> float:
        """Returns the (fractional) pair that turns this often within the context."""
        wavelength = scaling[_CONTEXT] / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(max_wavelength))

    low = pair_of(scaling.get("beta_fast") or 32)
    high = pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0.0, 1.0)


def _yarn_magnitude(scaling: dict[str, Any]) -> float:
    """Returns the factor of sines and cosines, which sharpens attention weights."""
    given, factor = scaling.get("attention_factor"), scaling["factor"]
    if given is not None:
        return float(given)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return magnitude(above) / magnitude(below) if above and below else magnitude(1.0)


_CONTEXT = "original_max_position_embeddings"
# The numbers that each type needs, and those that it may be given.
_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _CONTEXT),
    "yarn": ("factor", _CONTEXT),
}
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor")
