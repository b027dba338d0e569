"""Cases that count instead of timing: compilations, memory, the KV cache."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case, make_prompts
from benchmarks.processes import WorkerError, WorkerPool
from benchmarks.rows import Row
from benchmarks.runner import Checks
from benchmarks.training_cases import TrainingCase

# KerasHub compiles for each new length; a few lengths show that.
KERAS_HUB_LENGTHS = 5


def run_compilations(pool: WorkerPool, case: Case) -> list[Row]:
    """Returns rows of how much is compiled for prompts of many lengths."""
    errors: dict[str, str] = {}
    prompts = make_prompts(case.lengths, pool.shape.vocabulary_size, 1)
    few = prompts[:: max(1, len(prompts) // KERAS_HUB_LENGTHS)][:KERAS_HUB_LENGTHS]
    names = [x for x in pool.contestants if not x.startswith("transformers")]
    skipped = {x: "" for x in pool.contestants if x not in names}

    def count(name: str) -> dict[str, Any]:
        worker = pool.worker_with_new_model(name)
        chosen = few if name.startswith("keras_hub") else prompts
        new = case.max_new_tokens
        return worker.call("count", prompts=chosen, max_new_tokens=new)

    errors.update(skipped)
    replies = pool.for_each(count, errors)
    errors = {name: text for name, text in errors.items() if text}
    steps = Row(pool.shape.name, case, "compiled steps", "", False)
    backend = Row(pool.shape.name, case, "XLA compilations (JAX)", "", False)
    for name, reply in replies.items():
        for row, key in ((steps, "steps"), (backend, "backend")):
            if key in reply:
                row.add(name, [reply[key]])
    note = f"KerasHub: {len(few)} of the lengths only, each padded to its own"
    for row in (steps, backend):
        row.fields.update(errors=errors, comparable=False)
        row.fields["notes"].append(f"{note} + {case.max_new_tokens}")
    backend.fields["notes"].append("JAX compiles eager operations one by one, too")
    return [row for row in (steps, backend) if row.fields["values"] or errors]


def run_memory(
    pool: WorkerPool,
    case: Case | TrainingCase,
    request: dict[str, Any],
    checks: Checks,
) -> list[Row]:
    """Returns a row of the peak memory, each contestant in a fresh process.

    Args:
        pool: the contestants' processes.
        case: the case.
        request: the operation that needs the memory, as `of`, and its arguments.
        checks: compares the replies.
    """
    pool.close()
    errors: dict[str, str] = {}
    row = Row(pool.shape.name, case, "peak memory", "MiB", False)

    def measure(name: str) -> dict[str, Any]:
        worker = pool.start(name)
        try:
            pool.load(worker)
            return worker.call("memory", **request)
        finally:
            worker.close()

    for name, reply in pool.for_each(measure, errors).items():
        row.add(name, [reply["bytes"] / 2**20])
        checks.compare("all", name, reply)
        since = "loading" if reply["was_reset"] else "the start of the process"
        note = f"peak of the {reply['of']} since {since}, with compilation"
        if note not in row.fields["notes"]:
            row.fields["notes"].append(note)
    row.fields.update(errors=errors, void=checks.void)
    return [row]


def run_cache(pool: WorkerPool, case: Case) -> list[Row]:
    """Returns a row of the number of elements in this library's KV cache."""
    errors: dict[str, str] = {}
    ours = [name for name in pool.contestants if name.startswith("ours/")]
    row = Row(pool.shape.name, case, "numbers in the cache", "", False)
    batch = len(case.lengths)
    expected = pool.shape.cache_elements(batch, case.max_length)
    row.fields["notes"].append(
        f"2 x {pool.shape.num_layers} layers x {pool.shape.num_key_value_heads} "
        f"key/value heads x {case.max_length} x {pool.shape.head_dim} x {batch} "
        f"rows = {expected}"
    )
    for name in ours:
        try:
            reply = pool.worker(name).call(
                "cache_elements",
                prompts=make_prompts(case.lengths, pool.shape.vocabulary_size, 1),
                max_length=case.max_length,
            )
        except WorkerError as error:
            errors[name] = str(error)
            continue
        if reply["elements"] is None:
            row.fields["notes"].append(f"{name}: skipped, there is no `prefill`")
        else:
            row.add(name, [reply["elements"]])
    row.fields["errors"] = errors
    return [row]
