"""Choosing checks, running them one after the other, and reporting what failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import keras


class ConformanceError(AssertionError):
    """A layer or model that breaks a rule of the contract.

    Args:
        check: str. The name of the check that failed.
        message: str. The comparison, and the difference with its place.
        difference: float or `None`. The largest difference found.

    Attributes:
        check: the name of the check.
        difference: the largest difference found, or `None` if it is no number.

    Example:

    >>> from attention.testing import ConformanceError
    >>> print(ConformanceError("causality", "Token 3 changed output 2.", 0.5))
    Check 'causality' failed. Token 3 changed output 2.
    """

    def __init__(
        self, check: str, message: str, difference: float | None = None
    ) -> None:
        super().__init__(f"Check '{check}' failed. {message}")
        self.check = check
        self.difference = difference


class Checked:
    """An object under test, and how far its checks have come.

    Attributes:
        made: the layer or model.
        check: str. The check that runs.
        doing: str. The current use of the object, for the message of an error.
        largest: float. The largest difference that the check has found.
    """

    made: Any = None
    check, doing, largest = "", "made", 0.0

    def __str__(self) -> str:
        kind = "model" if isinstance(self.made, keras.Model) else "layer"
        return f"{kind} '{self.made.name}' ({type(self.made).__name__})"

    def fail(self, message: str, difference: float | None = None) -> NoReturn:
        raise ConformanceError(self.check, message, difference)


def select(checks: Any, known: Iterable[str]) -> list[str]:
    """Returns the names of the checks to run, in the order of `known`."""
    known = list(known)
    if checks is None:
        return known
    names = [checks] if isinstance(checks, str) else list(checks)
    if not names or not set(names) <= set(known):
        raise ValueError(
            f"`checks` must be some of {', '.join(known)}. Received: checks={checks!r}"
        )
    return [name for name in known if name in names]


def run_in_order(
    names: list[str], run: Callable[[str], None], checked: Checked
) -> dict[str, float]:
    """Runs checks until one fails, and returns the largest difference each found.

    `run` keeps `checked.largest` up to date. The first failure is raised as a
    `ConformanceError`, also where the object under test raised an error; its message
    says which checks held before.
    """
    report: dict[str, float] = {}
    for name in names:
        checked.check, checked.largest = name, 0.0
        try:
            run(name)
        except Exception as error:
            failure, cause = error, error.__cause__
            if not isinstance(failure, ConformanceError):
                raised = f"{checked} raised {type(error).__name__} when it was"
                message = f"{raised} {checked.doing}.\n  {error}"
                failure, cause = ConformanceError(name, message), error
            held = f"Checks that held before it: {', '.join(report) or 'none'}."
            failure.args = (f"{failure.args[0].rstrip()}\n  {held}",)
            raise failure from cause
        report[name] = float(checked.largest)
    return report
