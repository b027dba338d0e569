"""Samplers that a model is compiled with: checks, and the numbers that may change."""

from __future__ import annotations

import numbers
from typing import Any

import keras_hub

_samplers = keras_hub.samplers
# Numbers that these samplers only compute with. `k` is a shape, and how a user's own
# sampler uses a number is not known.
NUMBERS: dict[type, tuple[str, ...]] = {
    _samplers.GreedySampler: ("temperature",),
    _samplers.RandomSampler: ("temperature",),
    _samplers.TopKSampler: ("temperature",),
    _samplers.TopPSampler: ("temperature", "p"),
}

_CHOOSE_OF_K = (
    _samplers.TopKSampler,
    _samplers.TopPSampler,
    _samplers.ContrastiveSampler,
)


def check_sampler(task: Any, purpose: str | None = None) -> Any:
    """Returns the sampler that a model was compiled with, if `generate` can use it.

    `purpose` is an option that needs a sampler that chooses one token after the other.
    """
    sampler = getattr(task, "sampler", None)
    vocabulary_size = task.output.shape[-1]
    if sampler is None:
        raise ValueError(
            "The model is not compiled, so there is no sampler. Call "
            '`compile(sampler="greedy")`, or with another sampler.'
        )
    if isinstance(sampler, _samplers.SpeculativeSampler):
        raise ValueError(
            "`SpeculativeSampler` is not needed: any other sampler is sped up, with "
            "the same outputs, by `generate(..., speculation=DraftModel(...))` or "
            "`PromptLookup()`. Compile with the sampler you want."
        )
    if getattr(sampler, "return_all_beams", False):
        raise ValueError(
            "`generate` returns one continuation for each prompt. Compile "
            "with `BeamSampler(return_all_beams=False)`."
        )
    for name in NUMBERS.get(type(sampler), ("temperature",)):
        value = getattr(sampler, name, 1.0)
        if isinstance(value, numbers.Real) and not float(value) > 0:
            raise ValueError(
                f"`{name}` of the sampler must be larger than 0. For no randomness, "
                'compile with sampler="greedy". Received: '
                f"{type(sampler).__name__} with {name}={value}"
            )
    k = getattr(sampler, "k", None)
    if isinstance(sampler, _CHOOSE_OF_K) and k is not None and k > vocabulary_size:
        raise ValueError(
            f"`k` of the sampler must be at most {vocabulary_size}, the size of the "
            f"vocabulary. Received: {type(sampler).__name__} with k={k}"
        )
    if purpose is not None and has_own_loop(sampler):
        raise ValueError(
            f"`{type(sampler).__name__}` searches for one whole continuation by "
            f"itself, which does not go with {purpose}. Compile with a sampler that "
            "chooses one token after the other, such as 'greedy' or 'top_p'."
        )
    return sampler


def has_own_loop(sampler: Any) -> bool:
    """Returns whether a sampler searches by itself, as beam search does."""
    return type(sampler).__call__ is not _samplers.Sampler.__call__
