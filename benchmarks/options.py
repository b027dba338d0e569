"""What the options of a call cost, for each new token of a real checkpoint.

    python -m benchmarks.options FILE          # a folder or a GGUF file, with a tokenizer
    KERAS_BACKEND=jax python -m benchmarks.options FILE --rows 1 --rounds 7

Each option continues the same prompts by the same number of tokens, in turns; what a call
compiles is compiled before. Reported are the milliseconds of a step of all rows, and in
brackets the median of the rounds' ratios to the step without options.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from blocks import CausalLM, PromptLookup

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "minItems": 64,
}
PENALTIES = {
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
}
CASES: dict[str, dict[str, Any]] = {
    "no option": {},
    "temperature and seed": {"temperature": 0.8, "seed": 1},
    "with top_k=50, top_p=0.9, min_p=0.05": {
        "temperature": 0.8,
        "seed": 1,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
    },
    "three penalties": PENALTIES,
    "no_repeat_ngram_size=3": {"no_repeat_ngram_size": 3},
    "logit_bias of 8 tokens": {"logit_bias": dict.fromkeys(range(8), 1.0)},
    "return_logprobs=5": {"return_logprobs": 5},
    "stop strings": {"stop": ["\n\nQuestion", "</answer>"]},
    "grammar: a JSON schema": {"grammar": SCHEMA},
    "grammar with guesses": {"grammar": SCHEMA, "speculation": PromptLookup(4)},
}


def step_time(lm: Any, prompts: list[str], new: int, options: dict[str, Any]) -> float:
    """Returns the seconds of a step, without those of the prompt."""

    def run(count: int) -> tuple[float, int]:
        start = time.perf_counter()
        found = lm.generate(
            prompts,
            max_new_tokens=count,
            stop_token_ids=None,
            **{"return_logprobs": 0, **options},
        )
        return time.perf_counter() - start, max(len(x.token_ids) for x in found)

    (first, _), (whole, count) = run(1), run(new)
    return (whole - first) / (count - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lm = CausalLM.from_preset(arguments.checkpoint)
    lm.compile(sampler="greedy")
    people = "The people in the room, as JSON, with name and age, are: "
    prompts = [f"{people}{i} " for i in range(arguments.rows)]
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(arguments.rounds + 1):
        for name, options in CASES.items():
            seconds = step_time(lm, prompts, arguments.new_tokens, options)
            if number:
                times[name].append(seconds)
    print("| | ms a step |\n| --- | --- |")
    plain = np.array(times["no option"])
    for name, found in times.items():
        ratio = np.median(np.array(found) / plain)
        print(f"| {name} | {1000 * np.median(found):.1f} ({ratio:.2f}x) |")


if __name__ == "__main__":
    main()
