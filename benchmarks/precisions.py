"""The speed of decoding with weights and a KV cache of fewer bytes.

Run it from the repository's root: `python -m benchmarks.precisions`, with
`KERAS_BACKEND` for another backend than TensorFlow. The same GPT-2 124M in float32,
in bfloat16, with int8 weights (`backbone.quantize("int8")`) and with an int8 KV cache.
Fewer bytes are faster only where a backend has kernels for their type.
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

import keras

from attention import MultiHeadAttention
from benchmarks.cases import make_prompts, standard_plan
from benchmarks.keras_contestants import Ours, pad_right
from benchmarks.weights import ModelShape, random_weights
from blocks import CausalLM, CustomBackbone

SHAPE = standard_plan().models[0]
PROMPT = 64


class Int8CacheBackbone(CustomBackbone):
    """A backbone with an int8 KV cache."""

    def create_attention_layer(self, inputs_shape: tuple, layer_index: int) -> Any:
        return MultiHeadAttention(self.num_heads, cache_dtype="int8")


class Int8Cache(Ours):
    """This library with an int8 KV cache."""

    def backbone_class(self, shape: ModelShape) -> type[CustomBackbone]:
        """Returns the class of the backbone."""
        return Int8CacheBackbone


def loaded(
    weights: dict[str, Any], dtype: str = "float32", contestant: type[Ours] = Ours
) -> CausalLM:
    """Returns the language model of the benchmark."""
    ours = contestant()
    ours.load(SHAPE, weights, dtype)
    return ours.lm


def with_int8_weights(weights: dict[str, Any]) -> CausalLM:
    """Returns the language model with int8 dense kernels and embeddings."""
    lm = loaded(weights)
    lm.backbone.quantize("int8")
    return lm


PRECISIONS: dict[str, Callable[[dict[str, Any]], CausalLM]] = {
    "float32": loaded,
    "bfloat16": lambda weights: loaded(weights, "bfloat16"),
    "int8 weights": with_int8_weights,
    "int8 cache": lambda weights: loaded(weights, contestant=Int8Cache),
}


def decode_seconds(lm: CausalLM, rows: int, new: int) -> float:
    """Returns the seconds of `new` decode steps, without the prefill."""
    prompts = make_prompts((PROMPT,) * rows, SHAPE.vocabulary_size, 0)
    inputs = pad_right(prompts, PROMPT)
    seconds = []
    for count in (1, new + 1):
        start = time.perf_counter()
        lm.generate(inputs, max_new_tokens=count, stop_token_ids=None)
        seconds.append(time.perf_counter() - start)
    return seconds[1] - seconds[0]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    weights = random_weights(SHAPE)
    models = {name: make(weights) for name, make in PRECISIONS.items()}
    print(f"{SHAPE.name}, backend {keras.config.backend()}, {options.new} decode steps")
    for rows in options.rows:
        times: dict[str, list[float]] = {name: [] for name in models}
        for lm in models.values():
            decode_seconds(lm, rows, options.new)
        for _ in range(options.rounds):
            for name, lm in models.items():
                times[name].append(decode_seconds(lm, rows, options.new))
        medians = {name: statistics.median(found) for name, found in times.items()}
        for name, median in medians.items():
            speed = rows * options.new / median
            ratio = medians["float32"] / median
            print(f"batch {rows}, {name}: {speed:.1f} tokens/s, {ratio:.2f}x float32")


if __name__ == "__main__":
    main()
