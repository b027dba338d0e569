"""Rows of the report, as they are written to JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.cases import Case
from benchmarks.training_cases import TrainingCase


class Row:
    """One line of the report: a metric of a case, of every contestant.

    Args:
        model: the model's name.
        case: the case.
        metric: the name of the metric.
        unit: its unit.
        more_is_better: whether larger values are better.
    """

    def __init__(
        self,
        model: str,
        case: Case | TrainingCase,
        metric: str,
        unit: str,
        more_is_better: bool,
    ) -> None:
        self.fields: dict[str, Any] = {
            "model": model,
            "case": case.name,
            "metric": metric,
            "unit": unit,
            "more_is_better": more_is_better,
            "values": {},
            "errors": {},
            "void": None,
            "notes": [case.note] if case.note else [],
            "goals": [
                dataclasses.asdict(goal) for goal in case.goals if goal.metric == metric
            ],
        }

    def add(self, contestant: str, values: list[float | None]) -> None:
        """Adds a contestant's values, one for each round."""
        self.fields["values"][contestant] = values
