"""The models, cases and goals of training."""

from __future__ import annotations

import dataclasses

from benchmarks.cases import KERAS_HUB, Goal, Plan
from benchmarks.weights import ModelShape

# Of AdamW, everywhere.
ADAMW = {"learning_rate": 1e-4, "weight_decay": 0.01, "epsilon": 1e-8}
VOCABULARIES = (8192, 50257)
LARGE_VOCABULARY = 50_000

SPEED, SHARE, MEMORY = "training", "share of matrix limit", "peak memory"
SPEED_GOALS = (
    Goal(SPEED, 1.15, KERAS_HUB, backends=("tensorflow", "torch")),
    Goal(SPEED, 1.8, KERAS_HUB, backends=("jax",)),
    # Times the products' share of the step's time, which is measured in the run.
    Goal(SHARE, 0.9),
)


@dataclasses.dataclass(frozen=True)
class TrainingCase:
    """One call of `fit` to measure, of rows without padding.

    Attributes:
        name: unique within a model; `--only` filters by it.
        kind: `"time"` or `"memory"`.
        rows: the batch size.
        length: the number of tokens of a row.
        steps: the number of batches of a call.
        goals: the goals of the row.
        note: a note for readers of the row.
    """

    name: str
    kind: str
    rows: int
    length: int
    steps: int
    goals: tuple[Goal, ...] = ()
    note: str = ""


def time_case(rows: int, length: int, steps: int) -> TrainingCase:
    """Returns a case that times `fit`."""
    name = f"batch {rows} x {length}, {steps} steps"
    return TrainingCase(name, "time", rows, length, steps, SPEED_GOALS)


def memory_case(rows: int, length: int, shape: ModelShape) -> TrainingCase:
    """Returns a case of the peak memory of two steps in a fresh process."""
    large = shape.vocabulary_size >= LARGE_VOCABULARY
    goals = (Goal(MEMORY, at_most=0.6, against=KERAS_HUB),) if large else ()
    name = f"peak memory, batch {rows} x {length}"
    return TrainingCase(name, "memory", rows, length, 2, goals)


def make_shape(kind: str, vocabulary_size: int) -> ModelShape:
    """Returns a model of 6 layers that are 384 wide."""
    name = f"{'GPT-2' if kind == 'gpt2' else 'Llama'}-shaped, {vocabulary_size} tokens"
    heads, inner = (6, 1536) if kind == "gpt2" else (2, 1024)
    return ModelShape(name, kind, 6, 384, 6, heads, inner, vocabulary_size, 2048)


def make_plan(quick: bool, device: str) -> Plan:
    """Returns the plan of a run, which is the same on each device."""
    if quick:
        small = ModelShape("Llama-shaped, small", "llama", 2, 192, 6, 2, 512, 8192)
        return Plan((small,), {small.name: (time_case(4, 128, 4),)}, "float32")
    shapes = [make_shape(x, size) for x in ("gpt2", "llama") for size in VOCABULARIES]
    cases = {
        shape.name: (
            time_case(8, 256, 4),
            time_case(2, 2048, 3),
            memory_case(8, 256, shape),
            memory_case(2, 2048, shape),
        )
        for shape in shapes
    }
    # A step takes several GiB: one contestant at a time.
    return Plan(tuple(shapes), cases, "float32", together=1)
