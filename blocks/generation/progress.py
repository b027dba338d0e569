"""A progress bar for long calls."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from attention.contract import describe


def with_progress(batches: list[Any], verbose: Any, seconds: float) -> Iterator[Any]:
    """Yields batches, and shows how many were done.

    Args:
        batches: what is worked through.
        verbose: `"auto"`, 0 or 1. `"auto"` shows a bar where somebody watches
            (a terminal, a notebook) and there is more than one batch.
        seconds: float. After how many a bar is shown with `"auto"`.
    """
    show = bool(verbose)
    if verbose == "auto":
        show = len(batches) > 1 and _is_watched()
    if not show:
        yield from batches
        return
    yield from _with_bar(batches, seconds if verbose == "auto" else 0.0)


def check_verbose(verbose: Any) -> None:
    """Raises an error if `verbose` is none of what it may be.

    Raises:
        ValueError: in that case.
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
    # A notebook's output is no terminal, but is read by somebody.
    shell = sys.modules.get("IPython")
    kernel = getattr(shell, "get_ipython", lambda: None)() if shell else None
    return kernel is not None and hasattr(kernel, "kernel")
