"""The time of prompts of growing lengths, mixer by mixer.

Run it from the repository's root: `python -m benchmarks.linear_cost`. For twice
the length, sliding-window attention and recurrences should take about twice as long,
full attention up to four times. It times `prefill` of a language model whose only
layer is the mixer; with `--whole`, one call of the mixer on the whole prompt.
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
import blocks
from attention.testing.backends import compile_call
from benchmarks.keras_contestants import pad_right

HEADS, WIDTH, VOCABULARY = 4, 256, 256
# The largest ratio of times for twice the length.
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


class MixerBackbone(blocks.CustomBackbone):
    """A backbone of one mixer: without positions, norms and feed-forward layers."""

    def __init__(self, mixer: str, **kwargs: Any) -> None:
        self.mixer = mixer
        super().__init__(**kwargs)

    def create_position_embedding(self) -> None:
        return None

    def create_attention_layer(self, inputs_shape: tuple, layer_index: int) -> Any:
        return LAYERS[self.mixer]()

    def create_ffn(self, inputs_shape: tuple, layer_index: int) -> keras.layers.Layer:
        return keras.layers.Identity()

    def create_norm(self, inputs_shape: tuple, layer_index: int) -> keras.layers.Layer:
        return keras.layers.Identity()


def prefill(name: str, lengths: list[int]) -> list[Callable[[], None]]:
    """Returns a function for each length that runs `prefill`."""
    backbone = MixerBackbone(
        name,
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_heads=HEADS,
        hidden_dim=WIDTH,
        intermediate_dim=WIDTH,
    )
    lm = blocks.CausalLM(backbone)

    def make(length: int) -> Callable[[], None]:
        row = np.random.default_rng(0).integers(VOCABULARY, size=length)
        prompt = pad_right([row.tolist()], length)

        def run() -> None:
            state = lm.prefill(prompt, max_length=length)
            # Waits for the result.
            ops.convert_to_numpy(state.logits)

        return run

    return [make(length) for length in lengths]


def whole(name: str, lengths: list[int]) -> list[Callable[[], None]]:
    """Returns a function for each length that calls the layer with an empty cache."""
    layer = LAYERS[name]()
    layer.build((None, None, WIDTH))

    def make(length: int) -> Callable[[], None]:
        x = np.random.default_rng(0).normal(size=(1, length, WIDTH)).astype("float32")
        x = ops.convert_to_tensor(x)
        cache = layer.create_cache(1, length)
        call = compile_call(
            lambda x, cache: layer(x, cache=cache, cache_update_index=0)
        )

        def run() -> None:
            outputs, _ = call(x, cache)
            ops.convert_to_numpy(outputs[0, -1, 0])

        return run

    return [make(length) for length in lengths]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS))
    parser.add_argument("--whole", action="store_true", help="one call of the layer")
    options = parser.parse_args()
    print(f"backend {keras.config.backend()}, width {WIDTH}, {HEADS} heads, batch 1")
    for name in options.layers or LAYERS:
        runs = (whole if options.whole else prefill)(name, options.lengths)
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
