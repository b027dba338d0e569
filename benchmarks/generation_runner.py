"""Runs cases of generation."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import KERAS_HUB, Case, few_metric, make_prompts
from benchmarks.counts import run_cache, run_compilations, run_memory
from benchmarks.processes import WorkerError
from benchmarks.rows import Row
from benchmarks.runner import Runner
from benchmarks.tokens import Tokens

# How many prompts are tried to find a stop token.
STOP_SEEDS = 12
ITEM_SIZES = {"float32": 4, "bfloat16": 2}


class GenerationRunner(Runner):
    """Times prefill and decoding, and compares the tokens."""

    operation = "generate"

    def run(self, case: Case) -> list[Row]:
        if case.kind == "compilations":
            return run_compilations(self.pool, case)
        if case.kind == "cache":
            return run_cache(self.pool, case)
        if case.kind == "memory":
            prompts = self.prompts(case)
            tokens = Tokens(self.pool, case, prompts, self.plan.near_tie)
            request = {"prompts": prompts, "max_length": case.max_length}
            return run_memory(
                self.pool, case, {"what": self.operation, **request}, tokens
            )
        return self.run_time(case)

    def is_same_call(self, kind: str, name: str) -> bool:
        """Returns whether the call of few tokens is the call of all: for KerasHub."""
        return kind == "few" and name.startswith(KERAS_HUB)

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
        bandwidth = None
        if case.share:
            bandwidth = self.limit("bandwidth", ["bandwidth"], "GB/s", notes)
        seconds = self.time_rounds(requests, tokens, errors, notes)
        notes += tokens.notes
        rows = self.time_rows(case, seconds, bandwidth)
        for row in rows:
            row.fields["errors"] = errors
            row.fields["void"] = tokens.void
            row.fields["notes"] += notes
        return rows

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


def difference(whole: float | None, part: float | None) -> float | None:
    """Returns `whole - part`, or `None` if it is not positive."""
    if whole is None or part is None or whole <= part:
        return None
    return whole - part
