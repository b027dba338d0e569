"""A real checkpoint beside KerasHub and transformers: loading, first token, decoding.

    python -m benchmarks.checkpoints FOLDER            # of transformers: safetensors
    python -m benchmarks.checkpoints FOLDER --only ours/jax transformers
    python -m benchmarks.checkpoints FOLDER --rounds 5

Each contestant loads the folder in a fresh process, in turns, and generates greedily from
the same tokens. Reported are the seconds of loading (with the tokenizer; KerasHub's
without), how much memory it took at its peak beyond that of the imports, the seconds
until the first token after loading (compilation included), and tokens per second of one
row and of eight. Values are medians of the rounds; in brackets, the median of the rounds'
ratios to transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.processes import ROOT, environment

CONTESTANTS = [
    *(
        f"{x}/{y}"
        for x in ("ours", "keras_hub")
        for y in ("tensorflow", "jax", "torch")
    ),
    "transformers",
]
ROWS = {
    "loading, s": "load",
    "peak memory of loading, MiB": "memory",
    "first token after loading, s": "first",
    "decoding, 1 row, tokens/s": "decode_1",
    "decoding, 8 rows, tokens/s": "decode_8",
}
HIGHER_IS_BETTER = ("decode_1", "decode_8")
PROMPT = 64


def peak_mib() -> float:
    """Returns the largest memory of this process so far."""
    with open("/proc/self/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def make_ours(folder: str, dtype: str) -> tuple[Callable[[], Any], Callable]:
    from blocks import CausalLM

    def load() -> Any:
        lm = CausalLM.from_preset(folder, dtype=dtype)
        lm.compile(sampler="greedy")
        return lm

    def generate(lm: Any, tokens: np.ndarray, new: int) -> np.ndarray:
        outputs = lm.generate(tokens, max_new_tokens=new, stop_token_ids=None)
        return outputs["token_ids"]

    return load, generate


def make_keras_hub(folder: str, dtype: str) -> tuple[Callable[[], Any], Callable]:
    import keras_hub

    def load() -> Any:
        lm = keras_hub.models.CausalLM.from_preset(
            folder, dtype=dtype, preprocessor=None
        )
        lm.compile(sampler="greedy")
        return lm

    def generate(lm: Any, tokens: np.ndarray, new: int) -> np.ndarray:
        # Its length is that of what it is given.
        width = tokens.shape[1] + new
        padded = np.zeros((len(tokens), width), "int32")
        padded[:, : tokens.shape[1]] = tokens
        mask = np.broadcast_to(np.arange(width) < tokens.shape[1], padded.shape)
        x = {"token_ids": padded, "padding_mask": mask.astype("int32")}
        return np.asarray(lm.generate(x, stop_token_ids=None)["token_ids"])

    return load, generate


def make_transformers(folder: str, dtype: str) -> tuple[Callable[[], Any], Callable]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # What is imported on demand takes seconds.
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        getattr(transformers, json.load(file)["architectures"][0])

    def load() -> Any:
        if os.path.exists(os.path.join(folder, "tokenizer.json")):
            AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def generate(lm: Any, tokens: np.ndarray, new: int) -> np.ndarray:
        ids = torch.tensor(tokens.astype("int64"))
        options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
        mask = torch.ones_like(ids)
        return lm.generate(ids, attention_mask=mask, **options).numpy()

    return load, generate


def measure(
    contestant: str, folder: str, new: int, dtype: str, batches: list[int]
) -> dict[str, Any]:
    """Returns what one contestant does, in this process."""
    makers = {"ours": make_ours, "keras_hub": make_keras_hub}
    make = makers.get(contestant.partition("/")[0], make_transformers)
    load, generate = make(folder, dtype)
    before, start = peak_mib(), time.perf_counter()
    lm = load()
    found: dict[str, Any] = {"load": time.perf_counter() - start}
    found["memory"] = peak_mib() - before
    tokens = np.arange(100, 100 + PROMPT, dtype="int32")[None]
    start = time.perf_counter()
    generate(lm, tokens, 1)
    found["first"] = time.perf_counter() - start
    for rows in batches:
        inputs = np.repeat(tokens, rows, axis=0)

        def seconds(count: int, inputs: np.ndarray = inputs) -> float:
            start = time.perf_counter()
            generate(lm, inputs, count)
            return time.perf_counter() - start

        for count in (1, new):
            seconds(count)
        times = [(seconds(new), seconds(1)) for _ in range(3)]
        taken = np.median([both - first for both, first in times])
        found[f"decode_{rows}"] = rows * (new - 1) / taken
    found["tokens"] = generate(lm, tokens, new)[0].tolist()
    return found


def run(
    contestant: str,
    folder: str,
    new: int,
    dtype: str = "float32",
    batches: tuple[int, ...] = (1, 8),
) -> dict[str, Any] | None:
    """Returns what one contestant does, in a fresh process; `None` if it fails."""
    command = [sys.executable, "-m", "benchmarks.checkpoints", folder]
    command += ["--worker", contestant, "--dtype", dtype, "--new-tokens", str(new)]
    command += ["--batches", *map(str, batches)]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(contestant, "cpu"),
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        print(f"{contestant} failed:\n{finished.stderr[-1500:]}", file=sys.stderr)
        return None
    return json.loads(finished.stdout.splitlines()[-1])


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the medians as Markdown."""
    names = [name for name, rounds in found.items() if rounds]
    lines = [f"| | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    base = found.get("transformers")
    for title, key in ROWS.items():
        cells = []
        for name in names:
            values = [x[key] for x in found[name]]
            cell = f"{np.median(values):.3g}"
            if base and name != "transformers":
                ratios = [x[key] / y[key] for x, y in zip(found[name], base)]
                cell += f" ({np.median(ratios):.2f}x)"
            cells.append(cell)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", help="a checkpoint as transformers writes it")
    add("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    add("--rounds", type=int, default=3)
    add("--new-tokens", type=int, default=65)
    add("--dtype", default="float32")
    add("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    add("--batches", nargs="+", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments = (options.folder, options.new_tokens, options.dtype)
    if options.worker:
        print(json.dumps(measure(options.worker, *arguments, options.batches)))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            result = run(name, *arguments)
            if result is not None:
                found[name].append(result)
                print(name, {k: v for k, v in result.items() if k != "tokens"})
    print(table(found))
    tokens = {tuple(x["tokens"]) for rounds in found.values() for x in rounds}
    print("All chose the same tokens." if len(tokens) == 1 else "TOKENS DIFFER.")


if __name__ == "__main__":
    main()
