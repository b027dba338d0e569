"""Compares the tokens that contestants generate."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case
from benchmarks.processes import WorkerError, WorkerPool


class Tokens:
    """Compares the tokens of contestants, and notes differences.

    Args:
        pool: the contestants' processes.
        case: the case.
        prompts: its prompts.
        near_tie: the largest gap of two logits at which the choice between them
            counts as rounding.
    """

    def __init__(
        self, pool: WorkerPool, case: Case, prompts: list, near_tie: float
    ) -> None:
        self.near_tie = near_tie
        self.pool, self.case, self.prompts = pool, case, prompts
        self.reference: list[list[int]] | None = None
        self.name = ""
        self.references: dict[str, list[list[int]]] = {}
        self.void: str | None = None
        self.notes: list[str] = []

    def compare(self, kind: str, name: str, reply: dict[str, Any]) -> None:
        """Compares with the first contestant's tokens of this kind of call."""
        tokens = reply["tokens"]
        if kind not in self.references:
            self.references[kind] = tokens
            if kind == "all" or self.reference is None:
                self.reference, self.name = tokens, name
            few = [i for i, row in enumerate(tokens) if len(set(row)) < 3 < len(row)]
            if few:
                self.notes.append(f"greedy decoding repeats itself in rows {few}")
            return
        reference = self.references[kind]
        # KerasHub has no limit for each row and goes on.
        may_go_on = self.case.max_new_tokens is not None
        for r, (expected, row) in enumerate(zip(reference, tokens)):
            both = min(len(expected), len(row))
            differing = [n for n in range(both) if expected[n] != row[n]]
            if differing:
                self.differs(name, r, differing[0], expected, row)
                return
            if len(expected) != len(row) and not may_go_on:
                self.void = self.void or (
                    f"void: {name} gave {len(row)} new tokens in row {r}, "
                    f"{self.name} {len(expected)}"
                )
                return

    def differs(
        self, name: str, r: int, n: int, expected: list[int], row: list[int]
    ) -> None:
        """Notes a difference as a near tie, or makes the row void."""
        text = f"tokens differ at row {r}, new token {n + 1}: {name}, {self.name}"
        tie = False
        try:
            reply = self.pool.worker(self.name).call(
                "gap",
                row=self.prompts[r] + expected[:n],
                first=expected[n],
                second=row[n],
            )
            text += f"; the logits are {reply['gap']:.3g} apart"
            tie = abs(reply["gap"]) <= self.near_tie
        except WorkerError:
            pass
        if tie:
            note = f"near tie: {text}"
            if not any(x.startswith("near tie") for x in self.notes):
                self.notes.append(note)
        elif self.void is None:
            self.void = f"void: {text}"
