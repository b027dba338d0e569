"""Samplers: checks, the numbers that may change, and sampling a token."""

from __future__ import annotations

import copy
import json
import numbers
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from attention.contract import Tensor
from blocks.generation.prompts import tokenizer_size

_samplers = keras_hub.samplers
# Numbers that these samplers only compute with. `k` is a shape, and how a user's own
# sampler uses a number is not known.
_NUMBERS: dict[type, tuple[str, ...]] = {
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
    for name in _NUMBERS.get(type(sampler), ("temperature",)):
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


class Sampling:
    """How tokens are chosen in one generation, as it was when the generation began.

    Attributes:
        sampler: the `keras_hub.samplers.Sampler`.
        known: int or `None`. How many of the model's first tokens the tokenizer has, if
            it lacks some. Others are never chosen.
        settings: the numbers that a compiled step takes as arguments, by the sampler's
            attributes; none on torch, where nothing is compiled.
        contract: tuple. What is fixed in a compiled step.
    """

    def __init__(self, sampler: Any, task: Any) -> None:
        self.sampler = sampler
        known = tokenizer_size(task.preprocessor)
        self.known = known if known and known < task.output.shape[-1] else None
        is_torch = keras.config.backend() == "torch"
        names = () if is_torch else _NUMBERS.get(type(sampler), ())
        numbers_of = {name: getattr(sampler, name, None) for name in names}
        self.settings = {
            name: np.float32(value)
            for name, value in numbers_of.items()
            if isinstance(value, numbers.Real)
        }
        # A step that is not compiled reads the sampler itself.
        eager = is_torch or task.run_eagerly
        self.contract = (self.known, sampler if eager else self._config(task))

    def _config(self, task: Any) -> tuple:
        """Returns the class and `get_config()`, without the numbers that are arguments.

        Variables are read at each call. A user's class without a `get_config` of its own
        may hold more: then each `compile` counts as a change.
        """
        kind, config = type(self.sampler), self.sampler.get_config()
        if kind in _NUMBERS:
            # The seed is in a variable.
            arguments = {*self.settings, "seed"}
            config = {key: x for key, x in config.items() if key not in arguments}
        variables = [(tuple(v.shape), str(v.dtype)) for v in self.sampler.variables]
        is_keras_hubs = getattr(_samplers, kind.__name__, None) is kind
        is_told = is_keras_hubs or "get_config" in vars(kind)
        silent = None if is_told else (id(self.sampler), task.times_compiled)
        saved = json.dumps(keras.saving.serialize_keras_object(config), sort_keys=True)
        return kind, saved, variables, silent

    def choose(self, logits: Tensor, settings: dict[str, Tensor]) -> Tensor:
        """Returns a token for each row of logits, `(rows,)`.

        It is -1 where the logits are NaN or infinite.
        """
        # A copy for a trace, as other threads may use the sampler.
        sampler = copy.copy(self.sampler) if settings else self.sampler
        for name, value in settings.items():
            setattr(sampler, name, value)
        probabilities = sampler.compute_probabilities(self.mask_unknown(logits))
        # A single logit that is NaN or infinite makes all probabilities of its row NaN.
        broken = ops.isnan(probabilities[:, 0])
        probabilities = ops.where(broken[:, None], 1.0, probabilities)
        token = ops.cast(sampler.get_next_token(probabilities), "int32")
        return ops.where(broken, -1, token)

    def mask_unknown(self, logits: Tensor) -> Tensor:
        """Returns logits with -inf for tokens that the tokenizer does not have."""
        if self.known is None:
            return logits
        allowed = ops.arange(logits.shape[-1]) < self.known
        return ops.where(allowed[None], logits, float("-inf"))
