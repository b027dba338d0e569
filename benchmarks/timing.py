"""Times an operation that shows a limit of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def fastest(function: Callable[[], object], times: int) -> float:
    """Returns the seconds of a call: the 10th percentile of several."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return float(np.quantile(seconds, 0.1))
