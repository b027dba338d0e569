"""How much longer a prompt of twice the length takes, mixer by mixer.

Run it from the repository's root: `python -m benchmarks.linear_cost`. A window or a
recurrence should take about twice as long, full attention up to four times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import itertools

import keras
import numpy as np
from keras import ops

import attention
from attention.testing.backends import compile_call

HEADS, WIDTH = 4, 256
# At most so many times as long, for twice the length.
GOAL = 2.3
LAYERS: dict[str, Callable[[], Any]] = {
    "full attention": lambda: attention.RotaryAttention(HEADS),
    "window of 512": lambda: attention.RotaryAttention(HEADS, window=512),
    "latent, window of 512": lambda: attention.LatentAttention(HEADS, window=512),
    "retention": lambda: attention.Retention(HEADS),
    "mamba2": lambda: attention.Mamba2(HEADS, state_dim=64),
    "gated delta": lambda: attention.GatedDeltaNet(HEADS),
    "rwkv": lambda: attention.RWKVTimeMix(HEADS),
}


def prefill(layer: Any, length: int) -> Callable[[], None]:
    """A prompt into an empty cache, as generation does it."""
    x = np.random.default_rng(0).normal(size=(1, length, WIDTH)).astype("float32")
    x = ops.convert_to_tensor(x)
    cache = layer.create_cache(1, length)
    call = compile_call(lambda x, cache: layer(x, cache=cache, cache_update_index=0))

    def run() -> None:
        outputs, _ = call(x, cache)
        # Waits for what may be computed later.
        ops.convert_to_numpy(outputs[0, -1, 0])

    return run


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS))
    options = parser.parse_args()
    print(f"backend {keras.config.backend()}, width {WIDTH}, {HEADS} heads, batch 1")
    for name in options.layers or LAYERS:
        layer = LAYERS[name]()
        layer.build((None, None, WIDTH))
        runs = [prefill(layer, length) for length in options.lengths]
        for run in runs:
            run()
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(options.rounds):
            for run, found in zip(runs, times):
                start = time.perf_counter()
                run()
                found.append(time.perf_counter() - start)
        medians = [statistics.median(found) for found in times]
        ratios = [after / before for before, after in itertools.pairwise(medians)]
        shown = ", ".join(f"{n:,}: {t:.3f} s" for n, t in zip(options.lengths, medians))
        verdict = "" if name.startswith("full") or max(ratios) <= GOAL else "  MISSED"
        print(
            f"{name}: {shown}; times {', '.join(f'{r:.2f}' for r in ratios)}{verdict}"
        )


if __name__ == "__main__":
    main()
