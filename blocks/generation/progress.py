"""A progress bar for long calls."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from attention.contract import describe


def with_progress(batches: list[Any], verbose: Any, seconds: float) -> Iterator[Any]:
    """Yields batches, and shows how many are done.

    Args:
        batches: the batches.
        verbose: `"auto"`, 0 or 1. `"auto"` shows a bar in a terminal or a notebook if
            there is more than one batch.
        seconds: float. After how many seconds `"auto"` shows a bar.
    """
    show = bool(verbose)
    if verbose == "auto":
        show = len(batches) > 1 and _is_watched()
    if not show:
        yield from batches
        return
    yield from _with_bar(batches, seconds if verbose == "auto" else 0.0)


def check_verbose(verbose: Any) -> None:
    """Checks `verbose`.

    Raises:
        ValueError: if it is not `"auto"`, 0 or 1.
    """
    if verbose not in ("auto", 0, 1):
        raise ValueError(
            '`verbose` must be "auto", 0 (no progress bar) or 1. Received: '
            f"verbose={verbose if isinstance(verbose, (str, int)) else describe(verbose)}"
        )


def _with_bar(batches: Iterable[Any], delay: float) -> Iterator[Any]:
    batches = list(batches)
    bar = keras.utils.Progbar(len(batches), unit_name="batch")
    begin = time.monotonic()
    for done, batch in enumerate(batches):
        yield batch
        if time.monotonic() - begin >= delay:
            bar.update(done + 1, finalize=done + 1 == len(batches))


def _is_watched() -> bool:
    if sys.stdout is not None and sys.stdout.isatty():
        return True
    # A notebook's output is not a terminal, but is watched, too.
    shell = sys.modules.get("IPython")
    kernel = getattr(shell, "get_ipython", lambda: None)() if shell else None
    return kernel is not None and hasattr(kernel, "kernel")
