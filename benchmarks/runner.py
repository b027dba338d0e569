"""Runs cases: warms up all contestants, then times them in turn."""

from __future__ import annotations

import pathlib
from typing import Any

from benchmarks.cases import KERAS_HUB, Case, Plan, few_metric, make_prompts
from benchmarks.counts import run_cache, run_compilations, run_memory
from benchmarks.processes import WorkerError, WorkerPool
from benchmarks.rows import Row
from benchmarks.tokens import Tokens
from benchmarks.weights import ModelShape, random_weights, save_weights

# How many prompts are tried to find a stop token.
STOP_SEEDS = 12
# How many cores other processes may use before the row gets a note. It slows some
# libraries more than others: those whose threads wait for each other.
BUSY = 0.15
ITEM_SIZES = {"float32": 4, "bfloat16": 2}


class Runner:
    """Runs the cases of one model.

    Args:
        plan: what to run.
        shape: the model.
        contestants: their names; tokens are compared with the first one's.
        rounds: how many times each is timed.
        device: `"cpu"` or `"gpu"`.
        folder: for weights and logs.
        budget: after how many seconds in one case a contestant skips the remaining
            rounds.
    """

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
        self.pool = WorkerPool(contestants, shape, weights, plan.dtype, device, folder)

    def run(self, case: Case) -> list[dict[str, Any]]:
        """Runs a case and returns its rows for the report."""
        if case.kind == "compilations":
            rows = run_compilations(self.pool, case)
        elif case.kind == "memory":
            rows = run_memory(self.pool, case, self.plan.near_tie)
        elif case.kind == "cache":
            rows = run_cache(self.pool, case)
        else:
            rows = self.run_time(case)
        return [row.fields for row in rows]

    def prompts(self, case: Case, seed: int = 1) -> list[list[int]]:
        """Returns the prompts of a case."""
        return make_prompts(case.lengths, self.shape.vocabulary_size, seed)

    def run_time(self, case: Case) -> list[Row]:
        """Returns rows of the time of generation, in parts where the case says so."""
        errors: dict[str, str] = {}
        self.pool.for_each(self.pool.worker, errors)
        prompts, stops, notes = self.prompts(case), None, []
        if case.kind == "stop":
            prompts, stops, note = self.find_stop(case, errors)
            notes.append(note)
        request = {
            "prompts": prompts,
            "max_length": case.max_length,
            "max_new_tokens": case.max_new_tokens,
            "stops": stops,
        }
        requests = {"all": request}
        if case.few is not None:
            requests["few"] = {**request, "max_new_tokens": case.few}
        tokens = Tokens(self.pool, case, prompts, self.plan.near_tie)
        if case.kind == "first_token":
            first = self.first_tokens(prompts, errors)
            requests = {"prefill": {**request, "stops": first}}
        self.warm_up(requests, tokens, errors)
        if case.split and tokens.reference is not None:
            # The same call, but every row stops at its first token.
            first = sorted({row[0] for row in tokens.reference})
            requests["prefill"] = {**request, "stops": first}
            self.warm_up({"prefill": requests["prefill"]}, tokens, errors)
        bandwidth = self.bandwidth(notes) if case.share else None
        seconds, others = self.time_rounds(requests, tokens, errors)
        busy = [f"{name} {x:.1f}" for name, x in others.items() if x > BUSY]
        if busy:
            notes.append(f"BUSY MACHINE: cores in use by others: {', '.join(busy)}")
        notes += tokens.notes
        rows = self.time_rows(case, seconds, bandwidth)
        for row in rows:
            row.fields["errors"] = errors
            row.fields["void"] = tokens.void
            row.fields["notes"] += notes
        return rows

    def warm_up(self, requests: dict, tokens: Tokens, errors: dict[str, str]) -> None:
        """Makes each call once, so that it is compiled, and compares the tokens."""
        for kind, request in requests.items():
            replies = self.pool.for_each(
                lambda name, kind=kind, request=request: (
                    None
                    if is_same_call(kind, name)
                    else self.pool.worker(name).call("generate", **request)
                ),
                errors,
            )
            for name, reply in replies.items():
                if reply is not None:
                    tokens.compare(kind, name, reply["tokens"])

    def time_rounds(
        self, requests: dict, tokens: Tokens, errors: dict[str, str]
    ) -> tuple[dict[str, dict[str, list[float | None]]], dict[str, float]]:
        """Times each contestant once in each round, one at a time.

        Returns:
            The seconds by contestant, kind of call and round, and the number of cores
            that other processes used meanwhile, by contestant.
        """
        names = [name for name in self.contestants if name not in errors]
        seconds: dict[str, dict[str, list[float | None]]] = {
            name: {kind: [] for kind in requests} for name in names
        }
        spent, others = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for i in range(self.rounds):
            # In alternating order, so that none always follows the same other.
            for name in names if i % 2 == 0 else names[::-1]:
                sits_out = name in errors or (i >= 1 and spent[name] > self.budget)
                for kind, request in requests.items():
                    value = None
                    if is_same_call(kind, name):
                        value = seconds[name]["all"][-1]
                    elif not sits_out and name not in errors:
                        try:
                            reply = self.pool.worker(name).call("generate", **request)
                            value = reply["seconds"]
                            spent[name] += value
                            others[name] += reply["others"]
                            tokens.compare(kind, name, reply["tokens"])
                        except WorkerError as error:
                            errors[name] = str(error)
                    seconds[name][kind].append(value)
        names = [name for name in names if name not in errors]
        cores = {name: others[name] / max(spent[name], 1e-9) for name in names}
        return {name: seconds[name] for name in names}, cores

    def time_rows(
        self, case: Case, seconds: dict, bandwidth: float | None
    ) -> list[Row]:
        """Returns rows of prefill, decoding and all, from the seconds of each round."""
        model = self.shape.name
        first = Row(model, case, "prefill", "s", False)
        decode = Row(model, case, "decode", "tokens/s", True)
        whole = Row(model, case, "all", "s", False)
        few = Row(model, case, few_metric(case.few or 0), "s", False)
        share = Row(model, case, "share of bandwidth", "%", True)
        steps, batch = case.steps - 1, len(case.lengths)
        filled = (case.lengths[0] + case.max_length) / 2
        elements = self.shape.elements_read_per_step(batch, filled)
        read = elements * ITEM_SIZES[self.plan.dtype]
        for name, times in seconds.items():
            if "prefill" in times:
                first.add(name, times["prefill"])
            if "all" in times:
                whole.add(name, times["all"])
            if "few" in times:
                few.add(name, times["few"])
            if not case.split:
                continue
            pairs = zip(times["all"], times["prefill"])
            rest = [difference(x, y) for x, y in pairs]
            decode.add(name, [x and batch * steps / x for x in rest])
            if bandwidth:
                at_limit = read / bandwidth * steps
                share.add(name, [x and at_limit / x for x in rest])
        rows = (first, decode, whole, few, share)
        return [row for row in rows if row.fields["values"]]

    def first_tokens(self, prompts: list, errors: dict[str, str]) -> list[int]:
        """Returns the first new token of each row, from the first contestant."""
        reply = self.ask_first({"prompts": prompts, "max_new_tokens": 1}, errors)
        return sorted({row[0] for row in reply["tokens"]})

    def ask_first(self, request: dict, errors: dict[str, str]) -> dict[str, Any]:
        """Generates with the first contestant that has not failed."""
        length = max(map(len, request["prompts"])) + request["max_new_tokens"]
        for name in self.contestants:
            if name in errors:
                continue
            try:
                worker = self.pool.worker(name)
                return worker.call("generate", max_length=length, **request)
            except WorkerError as error:
                errors[name] = str(error)
        raise WorkerError("all contestants failed")

    def find_stop(
        self, case: Case, errors: dict[str, str]
    ) -> tuple[list[list[int]], list[int], str]:
        """Returns a prompt, and a token that greedy decoding first gives near the 32nd.

        Random weights may repeat a few tokens, so that none is new near the 32nd.
        Several prompts are tried, and the token that comes nearest is taken.

        Returns:
            The prompts, the stop tokens and a note for the report.
        """
        near, best = 32, None
        for seed in range(1, STOP_SEEDS + 1):
            prompts = self.prompts(case, seed)
            request = {"prompts": prompts, "max_new_tokens": near + 16}
            row = self.ask_first(request, errors)["tokens"][0]
            firsts = [i for i, x in enumerate(row) if x and x not in row[:i]]
            place = min(firsts, key=lambda i: abs(i + 1 - near))
            if best is None or abs(place + 1 - near) < abs(best[2] + 1 - near):
                best = (prompts, [row[place]], place, seed)
            if abs(place + 1 - near) <= 4:
                break
        prompts, stops, place, seed = best
        note = f"stops at new token {place + 1} (prompt seed {seed})"
        return prompts, stops, note

    def bandwidth(self, notes: list[str]) -> float | None:
        """Measures how many bytes the machine reads per second, and returns it."""
        try:
            found = self.pool.worker("bandwidth").call("bandwidth")
        except WorkerError as error:
            notes.append(f"no bandwidth: {error}")
            return None
        name = max(found, key=found.get)
        values = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in found.items())
        notes.append(f"bandwidth {found[name] / 1e9:.1f} GB/s, by {name} ({values})")
        return found[name]


def is_same_call(kind: str, name: str) -> bool:
    """Returns whether the call of few tokens is the call of all: for KerasHub."""
    return kind == "few" and name.startswith(KERAS_HUB)


def difference(whole: float | None, part: float | None) -> float | None:
    """Returns `whole - part`, or `None` if it is not positive."""
    if whole is None or part is None or whole <= part:
        return None
    return whole - part
