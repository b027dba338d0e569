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


def check_sampler(
    sampler: Any, vocabulary_size: int, purpose: str | None = None
) -> None:
    """Raises an error if a sampler can't be used by `generate`.

    Args:
        sampler: the sampler that the model was compiled with, or `None`.
        vocabulary_size: int. How many tokens there are to choose from.
        purpose: str or `None`. An option of `generate` that needs a sampler that
            chooses one token after the other.

    Raises:
        ValueError: if there is none, `generate` does not support it, alone or with
            `purpose`, its `k` is larger than the vocabulary, or its temperature or `p`
            is not positive.
    """
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
            advice = ' For no randomness, compile with sampler="greedy".'
            raise ValueError(
                f"`{name}` of the sampler must be larger than 0.{advice} Received: "
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


def has_own_loop(sampler: Any) -> bool:
    """Returns whether a sampler searches by itself, as beam search does."""
    return type(sampler).__call__ is not _samplers.Sampler.__call__


def number_settings(sampler: Any) -> dict[str, Any]:
    """Returns the numbers that a compiled step takes as arguments.

    They are a dict from attributes to float32 scalars; an empty one on torch, where
    nothing is compiled.
    """
    if keras.config.backend() == "torch":
        return {}
    settings = {}
    for name in _NUMBERS.get(type(sampler), ()):
        value = getattr(sampler, name, None)
        if isinstance(value, numbers.Real):
            settings[name] = np.float32(value)
    return settings


def sampler_contract(sampler: Any, task: Any) -> tuple:
    """Returns the part of a sampler that is fixed in a compiled step.

    It is the class and its `get_config()`, without the numbers that are arguments;
    variables are read at each call. A user's class without a `get_config` of its own
    may hold more: then each `compile` counts as a change.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.
        task: the model that was compiled with it.

    Returns:
        A tuple to be compared with another one.
    """
    kind = type(sampler)
    config = sampler.get_config()
    if kind in _NUMBERS:
        # The seed is in a variable.
        arguments = {*number_settings(sampler), "seed"}
        config = {key: value for key, value in config.items() if key not in arguments}
    variables = [(tuple(v.shape), str(v.dtype)) for v in sampler.variables]
    is_told = getattr(_samplers, kind.__name__, None) is kind or "get_config" in vars(
        kind
    )
    silent = None if is_told else (id(sampler), task.times_compiled)
    saved = json.dumps(keras.saving.serialize_keras_object(config), sort_keys=True)
    return kind, saved, variables, silent


def sample_token(
    sampler: Any, logits: Tensor, settings: dict[str, Any], known: int | None
) -> Tensor:
    """Samples a token for each row.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.
        logits: tensor of shape `(rows, vocabulary_size)`.
        settings: from `number_settings`.
        known: as for `mask_unknown`.

    Returns:
        `int32` tensor of shape `(rows,)`: the tokens, and -1 for a row whose logits are
        NaN or infinite.
    """
    sampler = with_settings(sampler, settings)
    probabilities = sampler.compute_probabilities(mask_unknown(logits, known))
    # A single logit that is NaN or infinite makes all probabilities of its row NaN.
    broken = ops.isnan(probabilities[:, 0])
    probabilities = ops.where(broken[:, None], 1.0, probabilities)
    token = ops.cast(sampler.get_next_token(probabilities), "int32")
    return ops.where(broken, -1, token)


def mask_unknown(logits: Tensor, known: int | None) -> Tensor:
    """Returns logits with -inf for tokens that the tokenizer does not have.

    Args:
        logits: tensor of shape `(rows, vocabulary_size)`.
        known: int or `None`. How many tokens there are to choose from; `None` means all.
    """
    if known is None:
        return logits
    allowed = ops.arange(logits.shape[-1]) < known
    return ops.where(allowed[None], logits, float("-inf"))


def with_settings(sampler: Any, settings: dict[str, Any]) -> Any:
    """Returns a copy of a sampler with tensors in place of its numbers, for a trace.

    A copy, as other threads may use the sampler.
    """
    if not settings:
        return sampler
    other = copy.copy(sampler)
    for name, value in settings.items():
        setattr(other, name, value)
    return other
