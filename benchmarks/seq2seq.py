"""Decoding of encoder-decoder models beside KerasHub and transformers.

    python -m benchmarks.seq2seq
    python -m benchmarks.seq2seq --only bart --backends jax --sources 64 512

Models of the shapes of T5-small and BART-base, with random weights, are written as
transformers does and loaded by each contestant that can, in a fresh process. They
continue one token greedily from the same sources, one row and eight. Reported are tokens
per second of decoding, without the encoder and the first token; in brackets, the ratio to
transformers. KerasHub has no cached decoding of T5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.processes import ROOT, environment

# transformers' defaults are T5-small's; BART-base has fewer layers than the default.
SHAPES: dict[str, dict[str, Any]] = {
    "t5": {"decoder_start_token_id": 0, "eos_token_id": None},
    "bart": {
        **dict.fromkeys(("d_model",), 768),
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 12),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 3072),
        "eos_token_id": None,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 2,
    },
}
BATCHES = (1, 8)


def write(model_type: str, folder: str) -> None:
    """Writes a model of random weights; it runs in a process of its own."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **SHAPES[model_type])
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    model.save_pretrained(folder)


def make_ours(folder: str) -> Callable:
    from blocks import Seq2SeqLM

    lm = Seq2SeqLM.from_preset(folder)
    lm.compile(sampler="greedy")

    def generate(sources: np.ndarray, start: int, new: int) -> np.ndarray:
        x = {
            "encoder_token_ids": sources,
            "decoder_token_ids": [[start]] * len(sources),
        }
        out = lm.generate(x, max_new_tokens=new, stop_token_ids=None)
        return out["decoder_token_ids"]

    return generate


def make_keras_hub(folder: str) -> Callable:
    import keras_hub

    lm = keras_hub.models.Seq2SeqLM.from_preset(folder, preprocessor=None)
    lm.compile(sampler="greedy")

    def generate(sources: np.ndarray, start: int, new: int) -> np.ndarray:
        tokens = np.full((len(sources), 1 + new), start, "int32")
        mask = np.zeros_like(tokens)
        mask[:, 0] = 1
        x = {
            "encoder_token_ids": sources,
            "encoder_padding_mask": np.ones_like(sources),
            "decoder_token_ids": tokens,
            "decoder_padding_mask": mask,
        }
        return np.asarray(lm.generate(x, stop_token_ids=None)["decoder_token_ids"])

    return generate


def make_transformers(folder: str) -> Callable:
    import torch
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)

    def generate(sources: np.ndarray, start: int, new: int) -> np.ndarray:
        return model.generate(
            torch.tensor(sources.astype("int64")),
            decoder_input_ids=torch.full((len(sources), 1), start),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
        ).numpy()

    return generate


def measure(
    contestant: str, folder: str, new: int, lengths: list[int], rounds: int
) -> dict[str, Any]:
    """Returns tokens per second by rows and length of the source, in this process."""
    makers = {"ours": make_ours, "keras_hub": make_keras_hub}
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        start = json.load(file)["decoder_start_token_id"]
    generate = makers.get(contestant.partition("/")[0], make_transformers)(folder)
    found: dict[str, Any] = {}
    for length in lengths:
        source = np.arange(100, 100 + length, dtype="int32")[None]
        for rows in BATCHES:
            sources = np.repeat(source, rows, axis=0)
            times = []
            for i in range(rounds + 1):
                begin = time.perf_counter()
                generate(sources, start, 1)
                first = time.perf_counter()
                tokens = generate(sources, start, new)
                if i:
                    # Not the first, which compiles.
                    times.append(time.perf_counter() - first - (first - begin))
            found[f"{rows} x {length}"] = rows * (new - 1) / float(np.median(times))
        found[f"tokens {length}"] = tokens[0].tolist()
    return found


def run(contestant: str, folder: str, options: argparse.Namespace) -> Any:
    """Returns what one contestant does, in a fresh process; `None` if it can't."""
    command = [sys.executable, "-m", "benchmarks.seq2seq", "--folder", folder]
    command += ["--worker", contestant, "--new-tokens", str(options.new_tokens)]
    command += ["--rounds", str(options.rounds)]
    command += ["--sources", *map(str, options.sources)]
    environ = environment(contestant, "cpu")
    finished = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True
    )
    if finished.returncode:
        print(f"{contestant}: {finished.stderr.splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(finished.stdout.splitlines()[-1])


def report(model_type: str, found: dict[str, dict[str, Any]]) -> None:
    """Prints a row for each size, and whether all chose the same tokens."""
    base = found.get("transformers")
    sizes = [x for x in next(iter(found.values())) if not x.startswith("tokens")]
    for size in sizes:
        cells = []
        for result in found.values():
            cell = f"{result[size]:.0f}"
            if base is not None and result is not base:
                cell += f" ({result[size] / base[size]:.2f}x)"
            cells.append(cell)
        print(f"| {model_type} | {size} | {' | '.join(cells)} |", flush=True)
    first = next(iter(found.values()))
    names = [x for x in first if x.startswith("tokens")]
    agree = all(x[name] == first[name] for x in found.values() for name in names)
    print(f"{model_type}: {'the same tokens' if agree else 'TOKENS DIFFER'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    add("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    add("--sources", nargs="+", type=int, default=[64, 512], help="their lengths")
    add("--new-tokens", type=int, default=65)
    add("--rounds", type=int, default=5)
    add("--folder", help=argparse.SUPPRESS)
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "write":
        write(options.only[0], options.folder)
        return
    if options.worker:
        sizes = (options.new_tokens, options.sources, options.rounds)
        print(json.dumps(measure(options.worker, options.folder, *sizes)))
        return
    names = [f"{x}/{y}" for y in options.backends for x in ("ours", "keras_hub")]
    for model_type in options.only:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.seq2seq", "--worker", "write"]
            command += ["--folder", folder, "--only", model_type]
            environ = environment("transformers", "cpu")
            subprocess.run(command, cwd=ROOT, env=environ, check=True)
            found = {}
            for name in [*names, "transformers"]:
                result = run(name, folder, options)
                if result is not None:
                    found[name] = result
        print(f"| model | rows x source | {' | '.join(found)} |")
        print("| --- " * (len(found) + 2) + "|")
        report(model_type, found)


if __name__ == "__main__":
    main()
