"""Runs cases of training."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import TRANSFORMERS, make_prompts
from benchmarks.counts import run_memory
from benchmarks.processes import WorkerError
from benchmarks.rows import Row
from benchmarks.runner import Runner
from benchmarks.training_cases import SHARE, SPEED, TrainingCase

# The largest relative difference of losses that rounding explains.
TOLERANCE = 1e-3


class Losses:
    """Compares the losses of contestants, call by call."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}

    def compare(self, kind: str, name: str, reply: dict[str, Any]) -> None:
        """Takes the loss of a contestant's next call.

        Raises:
            WorkerError: if a call after the first one compiled something.
        """
        own = self.losses.setdefault(name, [])
        own.append(reply["loss"])
        if len(own) > 1 and reply["compiled"]:
            raise WorkerError(f"call {len(own)} of fit compiled anew for equal shapes")

    @property
    def differences(self) -> list[tuple[float, str]]:
        """Returns each relative difference to the first contestant, and a text."""
        if not self.losses:
            return []
        (first, expected), *others = self.losses.items()
        return [
            (
                abs(x / y - 1),
                f"losses differ in call {i + 1}: {name} {x:.6g}, {first} {y:.6g}",
            )
            for name, losses in others
            for i, (x, y) in enumerate(zip(losses, expected))
        ]

    @property
    def void(self) -> str | None:
        """Returns why the row does not count, or `None`."""
        # NaN is no small difference.
        large = [text for x, text in self.differences if not x <= TOLERANCE]
        return f"void: {large[0]}" if large else None

    @property
    def notes(self) -> list[str]:
        """Returns the losses, for the report."""
        found = []
        for name, losses in list(self.losses.items())[:1]:
            most = max((x for x, _ in self.differences), default=0.0)
            found.append(
                f"mean loss of a call of {name}: {losses[0]:.4f} first, "
                f"{losses[-1]:.4f} last; the others differ by {most:.1e} at most"
            )
        return found


class TrainingRunner(Runner):
    """Times `fit`, and compares the losses."""

    operation = "train"

    def run(self, case: TrainingCase) -> list[Row]:
        lengths = (case.length + 1,) * (case.rows * case.steps)
        tokens = make_prompts(lengths, self.shape.vocabulary_size, 1)
        request = {"tokens": tokens, "rows": case.rows}
        losses = Losses()
        if case.kind == "memory":
            what = {"what": self.operation, **request}
            return run_memory(self.pool, case, what, losses)
        errors: dict[str, str] = {}
        # The case before left a trained one.
        self.pool.for_each(self.pool.worker_with_new_model, errors)
        self.warm_up({"all": request}, losses, errors)
        notes: list[str] = []
        names = self.one_for_each_backend(errors)
        limit = self.limit("matrix_limit", names, "GFLOP/s", notes)
        seconds = self.time_rounds({"all": request}, losses, errors, notes)
        speed = Row(self.shape.name, case, SPEED, "tokens/s", True)
        share = Row(self.shape.name, case, SHARE, "%", True)
        tokens_of_call = case.rows * case.length * case.steps
        operations = self.shape.training_operations(case.rows, case.length) * case.steps
        for name, times in seconds.items():
            speed.add(name, [x and tokens_of_call / x for x in times["all"]])
            if limit:
                share.add(name, [x and operations / x / limit for x in times["all"]])
        self.set_goal(share, request, errors, notes)
        rows = [row for row in (speed, share) if row.fields["values"] or errors]
        for row in rows:
            row.fields.update(errors=errors, void=losses.void)
            row.fields["notes"] += notes + losses.notes
        return rows

    def one_for_each_backend(self, errors: dict[str, str]) -> list[str]:
        """Returns a contestant of each backend that has not failed."""
        names = [name for name in self.contestants if name not in errors]
        return list({x.split("/")[1].split("-")[0]: x for x in names[::-1]}.values())

    def set_goal(
        self, share: Row, request: dict, errors: dict[str, str], notes: list[str]
    ) -> None:
        """Multiplies the goal of the share by the products' part of a step's time."""
        for name in self.contestants:
            if not name.startswith(TRANSFORMERS) or name in errors:
                continue
            try:
                part = self.pool.worker(name).call("products_part", **request)["part"]
            except WorkerError as error:
                notes.append(f"no part of the products: {error}")
                continue
            for goal in share.fields["goals"]:
                goal["at_least"] *= part
            notes.append(f"products take {part:.0%} of a step of {name}: in the goal")
