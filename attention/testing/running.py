"""Choosing checks, and running them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from attention.testing.failure import ConformanceError


def select(checks: Any, known: Iterable[str]) -> list[str]:
    """The names of the checks to run, in the order of `known`."""
    known = list(known)
    if checks is None:
        return known
    names = [checks] if isinstance(checks, str) else list(checks)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"`checks` must be some of {', '.join(known)}. Received: checks={checks!r}"
        )
    return [name for name in known if name in names]


def run_in_order(
    names: list[str],
    run: Callable[[str], float | None],
    situation: Callable[[], tuple[str, str]],
) -> dict[str, float]:
    """Runs checks until one fails.

    Args:
        names: the checks.
        run: runs a check; returns the largest difference that it found, or
            `None` where it does not apply.
        situation: says what is checked, and what is being done to it.

    Returns:
        A dict from each check that applies to what it found.

    Raises:
        ConformanceError: the first failure, also where the object under test
            raised an error; its message says which checks held before.
    """
    report: dict[str, float] = {}
    for name in names:
        try:
            found = run(name)
        except ConformanceError as error:
            raise _with_history(error, report) from error.__cause__
        except Exception as error:
            subject, doing = situation()
            message = (
                f"{subject} raised {type(error).__name__} when it was {doing}."
                f"\n  {error}"
            )
            raise _with_history(ConformanceError(name, message), report) from error
        if found is not None:
            report[name] = float(found)
    return report


def _with_history(error: ConformanceError, report: dict) -> ConformanceError:
    held = ", ".join(report) or "none"
    error.args = (f"{error.args[0].rstrip()}\n  Checks that held before it: {held}.",)
    return error
