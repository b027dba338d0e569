"""The models, cases and goals of generation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.weights import ModelShape

KERAS_HUB, TRANSFORMERS = "keras_hub", "transformers"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal for a row of the report.

    Attributes:
        metric: the metric of the row.
        at_least: how many times better than `against`, or with `against=None` the
            value.
        against: `"keras_hub"`, `"transformers"` or `None`.
        at_most: the largest value, or the largest part of the value of `against`, for
            metrics where less is better.
        backends: the backends that it is a goal for; empty means all.
    """

    metric: str
    at_least: float | None = None
    against: str | None = None
    at_most: float | None = None
    backends: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `generate` to measure.

    Attributes:
        name: unique within a model; `--only` filters by it.
        kind: `"time"`, `"first_token"`, `"stop"`, `"compilations"`, `"memory"` or
            `"cache"`.
        lengths: the prompts' lengths.
        max_length: the length of prompt and new tokens together.
        max_new_tokens: the most new tokens of each row; KerasHub has no such limit
            and goes on up to `max_length`.
        few: if given, a second call with this `max_new_tokens` is timed. For KerasHub
            it is the same call.
        split: whether prefill and decoding are timed apart, too.
        share: whether to report the share of the memory bandwidth.
        goals: the goals of the row.
        note: a note for readers of the row.
    """

    name: str
    kind: str
    lengths: tuple[int, ...]
    max_length: int
    max_new_tokens: int | None = None
    few: int | None = None
    split: bool = False
    share: bool = False
    goals: tuple[Goal, ...] = ()
    note: str = ""

    @property
    def steps(self) -> int:
        """Returns the number of new tokens of the first row."""
        return self.max_new_tokens or self.max_length - self.lengths[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The models and cases of a run.

    Attributes:
        models: the models' shapes.
        cases: the cases of each model, by its name.
        dtype: of weights and computations.
        near_tie: the largest gap of two logits at which the choice between them
            counts as rounding. With 0, any difference of tokens makes a row void.
        together: how many contestants may warm up at a time.
    """

    models: tuple[ModelShape, ...]
    cases: dict[str, tuple[Any, ...]]
    dtype: str
    near_tie: float = 0.0
    together: int = 2


def make_prompts(
    lengths: tuple[int, ...], vocabulary_size: int, seed: int
) -> list[list[int]]:
    """Returns random prompts without token 0, which stands for padding."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary_size, size=n).tolist() for n in lengths]


def batch_case(
    rows: int,
    prompt: int,
    total: int,
    goals: tuple[Goal, ...] = (),
    share: bool = False,
) -> Case:
    """Returns a case of prompts of one length, continued to `total` tokens."""
    name = f"batch {rows}, {prompt} + {total - prompt} = {total}"
    lengths = (prompt,) * rows
    return Case(name, "time", lengths, total, split=True, share=share, goals=goals)


def ragged_case(short: int, long: int, new: int) -> Case:
    """Returns a case of three short prompts and a long one.

    Timed with all rows continued to one length, and with `new` tokens each.
    """
    lengths = (short, short, short, long)
    names = ", ".join(map(str, lengths))
    total = long + new
    few = few_metric(new)
    return Case(
        f"ragged {names}, filled to {total}",
        "time",
        lengths,
        total,
        few=new,
        goals=(Goal("all", 4.0, KERAS_HUB), Goal(few, 20.0, KERAS_HUB)),
        note="transformers fills the short rows and the long one in two batches, "
        "summed: in one batch all rows get equally many tokens. THE WORK DIFFERS in "
        f"'{few}': KerasHub has no limit for each row and fills all rows.",
    )


def few_metric(new: int) -> str:
    """Returns the name of the metric of a call with a few new tokens."""
    return f"only {new} new each"


def stop_case(prompt: int, near: int, total: int) -> Case:
    """Returns a case with room for many tokens that stops after a few."""
    return Case(
        f"room for {total}, stop near {near}",
        "stop",
        (prompt,),
        total,
        max_new_tokens=None,
        goals=(Goal("all", 5.0, KERAS_HUB),),
    )


def first_token_case(prompt: int, new: int) -> Case:
    """Returns a case that times the first token."""
    name = f"first token, prompt {prompt} of {prompt + new}"
    return Case(name, "first_token", (prompt,), prompt + new)


def compilations_case(longest: int, prompts: int = 50) -> Case:
    """Returns a case of prompts of many lengths, each in a call of its own."""
    lengths = np.linspace(1, longest, prompts).round().astype(int).tolist()
    return Case(
        f"{prompts} lengths from 1 to {longest}, 8 new each",
        "compilations",
        tuple(lengths),
        longest + 8,
        max_new_tokens=8,
        goals=(Goal("compiled steps", at_most=8.0),),
    )


def memory_case(rows: int, prompt: int, total: int) -> Case:
    """Returns a case of the peak memory of one call in a fresh process."""
    name = f"peak memory, batch {rows}, {prompt} + {total - prompt} = {total}"
    return Case(name, "memory", (prompt,) * rows, total)


def cache_case(rows: int, prompt: int, total: int) -> Case:
    """Returns a case of the size of the KV cache."""
    return Case(f"cache, batch {rows}, {total}", "cache", (prompt,) * rows, total)


ALL_OF_BATCH_4 = (Goal("all", 2.2, KERAS_HUB), Goal("decode", 4.0, KERAS_HUB))
BATCH_1 = (
    Goal("decode", 1.5, KERAS_HUB),
    Goal("decode", 1.0, TRANSFORMERS),
    Goal("share of bandwidth", 0.7),
)
BATCH_8 = (Goal("decode", 3.0, KERAS_HUB), Goal("decode", 1.5, TRANSFORMERS))


def standard_plan() -> Plan:
    """Returns the plan for a CPU: GPT-2 124M and a Llama-shaped 135M in float32."""
    gpt2 = ModelShape("GPT-2 124M", "gpt2", 12, 768, 12, 12, 3072, 50257)
    llama = ModelShape("Llama-shaped 135M", "llama", 30, 576, 9, 3, 1536, 49152)
    cases = (
        batch_case(1, 64, 256, BATCH_1, share=True),
        batch_case(8, 64, 256, BATCH_8, share=True),
        # Long prompts: the decode steps of a long sequence, in a fifth of the time.
        batch_case(1, 832, 1024, BATCH_1, share=True),
        batch_case(8, 832, 1024, BATCH_8, share=True),
        batch_case(4, 64, 1024, ALL_OF_BATCH_4),
        ragged_case(16, 512, 32),
        stop_case(16, 32, 1024),
        first_token_case(512, 32),
        compilations_case(512),
        memory_case(8, 832, 1024),
    )
    by_model = {gpt2.name: cases, llama.name: (*cases, cache_case(4, 64, 1024))}
    # Float32 logits nearer than this differ by the order of summation only. Over
    # thousands of tokens from random weights, some choice depends on that.
    return Plan((gpt2, llama), by_model, "float32", 1e-5)


def quick_plan() -> Plan:
    """Returns a plan of minutes: a small model and few cases.

    One model, as the processes of all contestants take time to start, and no peak
    memory, which needs another process of each.
    """
    llama = ModelShape("Llama-shaped, small", "llama", 4, 288, 9, 3, 768, 8192)
    cases = (
        batch_case(1, 64, 256, BATCH_1, share=True),
        batch_case(4, 16, 64),
        ragged_case(16, 128, 32),
        stop_case(16, 32, 256),
        compilations_case(128),
        cache_case(4, 64, 256),
    )
    return Plan((llama,), {llama.name: cases}, "float32", 0.0)


def gpu_plan() -> Plan:
    """Returns the plan for one large GPU: a Llama-shaped 1B in bfloat16."""
    llama = ModelShape(
        "Llama-shaped 1B", "llama", 16, 2048, 32, 8, 8192, 128256, positions=4096
    )
    cases = (
        *(
            batch_case(rows, 64, total, goals, share=True)
            for rows, goals in ((1, BATCH_1), (64, BATCH_8))
            for total in (1024, 4096)
        ),
        ragged_case(16, 512, 32),
        stop_case(16, 32, 1024),
        first_token_case(512, 32),
        compilations_case(512),
        memory_case(64, 64, 1024),
        cache_case(64, 64, 1024),
    )
    # A logit of about 2.5 has steps of 0.016 in bfloat16.
    return Plan((llama,), {llama.name: cases}, "bfloat16", 0.05)


def make_plan(quick: bool, device: str) -> Plan:
    """Returns the plan of a run."""
    if quick:
        plan = quick_plan()
        if device == "gpu":
            plan = dataclasses.replace(plan, dtype="bfloat16", near_tie=0.05)
        return plan
    return gpu_plan() if device == "gpu" else standard_plan()
