"""How a failed check is reported."""

from __future__ import annotations


class ConformanceError(AssertionError):
    """A layer or model that breaks a rule of the contract.

    Args:
        check: str. The name of the check that failed.
        message: str. What was compared, what was found and where.
        difference: float or `None`. The largest difference found.

    Attributes:
        check: the name of the check.
        difference: the largest difference found, or `None` where the failure
            is no number.

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
