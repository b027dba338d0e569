"""Finding the largest difference between two results, and saying where it is."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Difference:
    """Where two arrays of shape `(batch, length, ...)` differ the most."""

    largest: float
    place: str
    wrong: np.ndarray
    """Boolean, `(batch, length)`: what is off by more than is allowed."""
    allowed: float

    def __bool__(self) -> bool:
        return bool(self.wrong.any())

    @property
    def wrong_rows(self) -> np.ndarray:
        """Boolean, `(batch,)`."""
        return np.asarray(self.wrong.any(axis=1))

    @property
    def wrong_positions(self) -> np.ndarray:
        """Boolean, `(length,)`."""
        return np.asarray(self.wrong.any(axis=0))


def difference(
    actual: list[np.ndarray],
    expected: list[np.ndarray],
    relative: float,
    where: np.ndarray | None = None,
    positions: np.ndarray | int = 0,
) -> Difference:
    """Compares outputs position by position.

    Args:
        actual: arrays of shape `(batch, length, ...)`.
        expected: likewise.
        relative: the difference that is allowed, for values of size 1.
        where: boolean `(batch, length)`: the outputs that count.
        positions: the position in the sequence of the first output: one for
            all rows, or one for each.
    """
    worst: Difference | None = None
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != b.shape:
            place = f"in shape: {a.shape} instead of {b.shape}"
            return Difference(np.inf, place, np.ones(b.shape[:2], bool), 0.0)
        a, b = a.astype("float64"), b.astype("float64")
        with np.errstate(invalid="ignore"):
            gap = np.abs(a - b)
        # Infinite where expected, too, is no difference; NaN always is one.
        gap = np.where(a == b, 0.0, np.where(np.isnan(gap), np.inf, gap))
        if where is not None:
            counts = where.reshape(where.shape + (1,) * (gap.ndim - 2))
            gap = np.where(counts, gap, 0.0)
        scale = np.abs(b[np.isfinite(b)]).max(initial=1.0)
        found = _worst(gap, a, b, relative * scale, positions)
        if len(actual) > 1:
            found.place = f"in output {number}, {found.place}"
        if worst is None or found.largest > worst.largest:
            worst = found
    assert worst is not None
    return worst


def _worst(
    gap: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    allowed: float,
    positions: np.ndarray | int,
) -> Difference:
    if not gap.size:
        return Difference(0.0, "nowhere", np.zeros(gap.shape[:2], bool), allowed)
    index = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
    start = positions if np.ndim(positions) == 0 else np.asarray(positions)[index[0]]
    place = f"in row {index[0]}, at position {index[1] + int(start)}"
    if len(index) > 2:
        feature = index[2] if len(index) == 3 else index[2:]
        place += f", feature {feature}"
    place += f": got {a[index]:.6g}, expected {b[index]:.6g}"
    above = (gap > allowed).reshape(*gap.shape[:2], -1)
    wrong = np.asarray(above.any(axis=-1))
    return Difference(float(gap[index]), place, wrong, allowed)


def ranges(flags: np.ndarray, start: int = 0) -> str:
    """The indices at which flags are set, as in `"3, 8-23"`."""
    indices = np.flatnonzero(flags) + start
    if not len(indices):
        return "none"
    breaks = np.flatnonzero(np.diff(indices) > 1)
    firsts = indices[np.r_[0, breaks + 1]]
    lasts = indices[np.r_[breaks, len(indices) - 1]]
    parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts)]
    return ", ".join(parts[:6]) + (", ..." if len(parts) > 6 else "")
