"""Runs cases: warms up all contestants, then measures them in turn."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.cases import Plan
from benchmarks.processes import WorkerError, WorkerPool
from benchmarks.rows import Row
from benchmarks.weights import ModelShape, random_weights, save_weights

# How many cores other processes may use before the row gets a note. It slows some
# libraries more than others: those whose threads wait for each other.
BUSY = 0.15

Seconds = dict[str, dict[str, list[float | None]]]


class Checks(Protocol):
    """Compares the contestants' replies, so that equal work is compared.

    Attributes:
        void: why the row does not count, or `None`.
        notes: for the report.
    """

    notes: list[str]

    @property
    def void(self) -> str | None: ...

    def compare(self, kind: str, name: str, reply: dict[str, Any]) -> None:
        """Takes a contestant's reply to a kind of call.

        Raises:
            WorkerError: if the contestant did not do what is measured.
        """


class Runner:
    """Runs the cases of one model.

    Args:
        plan: what to run.
        shape: the model.
        contestants: their names; replies are compared with the first one's.
        rounds: how many times each is timed.
        device: `"cpu"` or `"gpu"`.
        folder: for weights and logs.
        budget: after how many seconds in one case a contestant skips the remaining
            rounds.
    """

    # The operation of `benchmarks.worker` that is timed.
    operation: str

    def __init__(
        self,
        plan: Plan,
        shape: ModelShape,
        contestants: list[str],
        rounds: int,
        device: str,
        folder: pathlib.Path,
        budget: float = 300.0,
    ) -> None:
        self.plan, self.shape, self.rounds = plan, shape, rounds
        self.contestants = contestants
        self.budget = budget
        weights = folder / f"{shape.kind}.npz"
        save_weights(weights, random_weights(shape))
        self.pool = WorkerPool(
            contestants, shape, weights, plan.dtype, device, folder, plan.together
        )

    def run(self, case: Any) -> list[Row]:
        """Runs a case and returns its rows for the report."""
        raise NotImplementedError

    def is_same_call(self, kind: str, name: str) -> bool:
        """Returns whether a kind of call is the one of "all", for a contestant."""
        return False

    def warm_up(self, requests: dict, checks: Checks, errors: dict[str, str]) -> None:
        """Makes each call once, so that it is compiled, and compares the replies."""
        for kind, request in requests.items():
            replies = self.pool.for_each(
                lambda name, kind=kind, request=request: (
                    None
                    if self.is_same_call(kind, name)
                    else self.pool.worker(name).call(self.operation, **request)
                ),
                errors,
            )
            for name, reply in replies.items():
                if reply is not None:
                    checks.compare(kind, name, reply)

    def time_rounds(
        self, requests: dict, checks: Checks, errors: dict[str, str], notes: list[str]
    ) -> Seconds:
        """Times each contestant once in each round, one at a time.

        Args:
            requests: the arguments of each kind of call.
            checks: compares the replies.
            errors: the errors so far by contestant; new ones are added.
            notes: those of the report; one is added if others used the processor.

        Returns:
            The seconds by contestant, kind of call and round.
        """
        names = [name for name in self.contestants if name not in errors]
        seconds: Seconds = {name: {kind: [] for kind in requests} for name in names}
        spent, others = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for i in range(self.rounds):
            # In alternating order, so that none always follows the same other.
            for name in names if i % 2 == 0 else names[::-1]:
                sits_out = name in errors or (i >= 1 and spent[name] > self.budget)
                for kind, request in requests.items():
                    value = None
                    if self.is_same_call(kind, name):
                        value = seconds[name]["all"][-1]
                    elif not sits_out and name not in errors:
                        try:
                            worker = self.pool.worker(name)
                            reply = worker.call(self.operation, **request)
                            value = reply["seconds"]
                            spent[name] += value
                            others[name] += reply["others"]
                            checks.compare(kind, name, reply)
                        except WorkerError as error:
                            errors[name] = str(error)
                    seconds[name][kind].append(value)
        names = [name for name in names if name not in errors]
        cores = {name: others[name] / max(spent[name], 1e-9) for name in names}
        busy = [f"{name} {x:.1f}" for name, x in cores.items() if x > BUSY]
        if busy:
            notes.append(f"BUSY MACHINE: cores in use by others: {', '.join(busy)}")
        return {name: seconds[name] for name in names}

    def limit(
        self, operation: str, names: Sequence[str], unit: str, notes: list[str]
    ) -> float | None:
        """Measures what the machine can do at most, and returns it.

        Args:
            operation: that of `benchmarks.worker`, which returns several rates.
            names: the contestants to ask. The fastest way of all counts.
            unit: the unit of 1e9.
            notes: those of the report; one is added.
        """
        title, found = operation.replace("_", " "), {}
        for name in names:
            try:
                found.update(self.pool.worker(name).call(operation))
            except WorkerError as error:
                notes.append(f"no {title} of {name}: {error}")
        if not found:
            return None
        best = max(found, key=found.get)
        values = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in found.items())
        notes.append(f"{title} {found[best] / 1e9:.1f} {unit}, by {best} ({values})")
        return found[best]
