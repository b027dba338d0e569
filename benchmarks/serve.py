"""Serving: requests that join a running batch, beside the same requests in fixed batches.

    python -m benchmarks.serve                       # 64 requests, a GPT-2 124M
    python -m benchmarks.serve --quick               # 24 requests, a small model
    python -m benchmarks.serve --only serve/jax fixed/jax --rounds 3

All contestants have the same random weights and get the same requests at the same times:
prompts of 16 to 512 tokens that arrive at random, of which each wants 16 to 128 new ones,
chosen greedily. `serve` is `lm.serve`. A fixed batch is of the requests that are waiting, up
to 8, continued by one call of `generate` until the longest of them is done; who comes later
waits for the next. Each contestant is a fresh process, in turns, which compiles before the
clock starts. Reported are the new tokens that were asked for by all seconds from the first
arrival to the last answer, and the 95th percentile of the seconds from a request's arrival
to its first token: of a fixed batch that is its end. Values are medians of the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from benchmarks.processes import ROOT, environment
from benchmarks.weights import ModelShape, random_weights

GPT2 = ModelShape("GPT-2 124M", "gpt2", 12, 768, 12, 12, 3072, 50257)
SMALL = ModelShape("GPT-2-shaped, small", "gpt2", 4, 256, 4, 4, 1024, 8192)
ROWS = 8
PROMPTS, NEW = (16, 512), (16, 128)
MAX_LENGTH = PROMPTS[1] + NEW[1]
CONTESTANTS = [
    *(f"serve/{x}" for x in ("tensorflow", "jax", "torch")),
    *(f"fixed/{x}" for x in ("tensorflow", "jax", "torch")),
    *(f"keras_hub/{x}" for x in ("tensorflow", "jax")),
    "transformers/torch",
]


@dataclasses.dataclass
class Asked:
    """One request: when it arrives, its prompt and how many tokens it wants.

    `first` and `last` are the times of its first token and of its answer.
    """

    arrival: float
    prompt: list[int]
    new: int
    first: float = 0.0
    last: float = 0.0


def make_requests(count: int, gap: float, vocabulary_size: int) -> list[Asked]:
    """Draws requests, whose arrivals are `gap` seconds apart in the mean."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(gap, count)) - gap
    found = []
    for arrival in arrivals:
        length, new = rng.integers(*PROMPTS, endpoint=True), rng.integers(*NEW)
        prompt = rng.integers(1, vocabulary_size, length).tolist()
        found.append(Asked(max(float(arrival), 0.0), prompt, int(new)))
    return found


def run_serve(contestant: Any, requests: list[Asked]) -> float:
    """Answers requests by `lm.serve`; returns the seconds that all took."""
    with contestant.lm.serve(max_rows=ROWS, max_length=MAX_LENGTH) as server:
        start = time.perf_counter()

        def ask(asked: Asked) -> None:
            time.sleep(max(0.0, asked.arrival - (time.perf_counter() - start)))
            request = server.submit(asked.prompt, asked.new, stop_token_ids=None)
            for number, _ in enumerate(request):
                if not number:
                    asked.first = time.perf_counter() - start
            asked.last = time.perf_counter() - start

        threads = [threading.Thread(target=ask, args=(x,)) for x in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return max(x.last for x in requests)


def run_fixed(contestant: Any, requests: list[Asked]) -> float:
    """Answers requests in fixed batches; returns the seconds that all took."""
    for count in (ROWS, 1):
        answer_batch(contestant, requests[:count])
    start, left = time.perf_counter(), list(requests)
    while left:
        now = time.perf_counter() - start
        batch = [x for x in left if x.arrival <= now][:ROWS]
        if not batch:
            time.sleep(max(0.0, left[0].arrival - now))
            continue
        answer_batch(contestant, batch)
        for asked in batch:
            asked.first = asked.last = time.perf_counter() - start
        left = left[len(batch) :]
    return max(x.last for x in requests)


def answer_batch(contestant: Any, batch: list[Asked]) -> None:
    """Calls `generate` once, with full rows: another size of a batch would be compiled."""
    prompts = [x.prompt for x in batch]
    prompts += prompts[:1] * (ROWS - len(prompts))
    new = max(x.new for x in batch)
    inputs = contestant.prepare(prompts, MAX_LENGTH)
    contestant.generate(inputs, MAX_LENGTH, new, None)


def measure(name: str, quick: bool) -> dict[str, float]:
    """Runs one contestant in this process."""
    kind, _, backend = name.partition("/")
    shape = SMALL if quick else GPT2
    if kind == "transformers":
        from benchmarks.torch_contestants import Transformers

        contestant: Any = Transformers()
    else:
        from benchmarks.keras_contestants import KerasHub, Ours

        contestant = Ours()
        if kind == "keras_hub":
            # The faster of its two ways on TensorFlow.
            contestant = KerasHub(True if backend == "tensorflow" else "auto")
    contestant.load(shape, random_weights(shape), "float32")
    count, gap = (24, 0.1) if quick else (64, 0.25)
    requests = make_requests(count, gap, shape.vocabulary_size)
    run = run_serve if kind == "serve" else run_fixed
    seconds = run(contestant, requests)
    waited = [x.first - x.arrival for x in requests]
    return {
        "tokens/s": sum(x.new for x in requests) / seconds,
        "first token, 95th percentile, s": float(np.percentile(waited, 95)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.quick)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            command = [sys.executable, "-m", "benchmarks.serve", "--one", name]
            run = subprocess.run(
                [*command, *(["--quick"] if options.quick else [])],
                cwd=ROOT,
                env=environment(name, "cpu"),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    print("| | tokens/s | first token, 95th percentile, s |\n| --- | --- | --- |")
    for name, rounds in found.items():
        values = [np.median([x[key] for x in rounds]) for key in rounds[0]]
        print(f"| {name} | {values[0]:.1f} | {values[1]:.2f} |")


if __name__ == "__main__":
    main()
