"""Finding the largest difference between two results, and where it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass
class Difference:
    """Where two arrays of shape `(batch, length, ...)` differ the most.

    Attributes:
        largest: float. The largest difference.
        place: str. Where it is.
        wrong: boolean `(batch, length)`: what is off by more than is allowed.
        allowed: float.
    """

    largest: float
    place: str
    wrong: np.ndarray
    allowed: float

    def __bool__(self) -> bool:
        return bool(self.wrong.any())

    @property
    def rows(self) -> str:
        """The rows that are wrong, for a message."""
        return f"Rows that are wrong: {ranges(np.asarray(self.wrong.any(axis=1)))}."

    @property
    def positions(self) -> np.ndarray:
        """Boolean, `(length,)`: the positions that are wrong."""
        return np.asarray(self.wrong.any(axis=0))


def difference(
    actual: list[np.ndarray],
    expected: list[np.ndarray],
    relative: float,
    where: np.ndarray | None = None,
    positions: Any = 0,
) -> Difference:
    """Compares outputs, arrays `(batch, length, ...)`, position by position.

    `relative` is the difference that is allowed, for values of size 1; `where`,
    `(batch, length)`, marks the outputs that count; and `positions` is the position in
    the sequence of the first output, one for all rows or one for each.
    """
    found = []
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
            gap = np.where(where.reshape(where.shape + (1,) * (gap.ndim - 2)), gap, 0.0)
        allowed = relative * np.abs(b[np.isfinite(b)]).max(initial=1.0)
        wrong = (gap > allowed).any(axis=tuple(range(2, gap.ndim)))
        if not gap.size:
            found.append(Difference(0.0, "nowhere", wrong, allowed))
            continue
        index = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
        row, position, *feature = index
        start = np.broadcast_to(positions, len(gap))[row]
        place = f"in row {row}, at position {position + start}"
        place += f", feature {', '.join(map(str, feature))}" if feature else ""
        place += f": got {a[index]:.6g}, expected {b[index]:.6g}"
        place = f"in output {number}, {place}" if len(actual) > 1 else place
        found.append(Difference(float(gap[index]), place, wrong, allowed))
    return max(found, key=lambda x: x.largest)


def ranges(flags: np.ndarray) -> str:
    """Returns the indices at which flags are set, as in `"3, 8-23"`."""
    indices = np.flatnonzero(flags)
    if not len(indices):
        return "none"
    parts = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    texts = [f"{x[0]}" if len(x) == 1 else f"{x[0]}-{x[-1]}" for x in parts]
    return ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "")
