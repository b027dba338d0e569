"""The settings of samplers: which may change without compiling anew."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

import keras_hub
import numpy as np

_samplers = keras_hub.samplers
# What these samplers only compute with. How many tokens `k` leaves decides
# shapes; and what a sampler of the user's does with a number, nobody knows.
_NUMBERS: dict[type, tuple[str, ...]] = {
    _samplers.GreedySampler: ("temperature",),
    _samplers.RandomSampler: ("temperature",),
    _samplers.TopKSampler: ("temperature",),
    _samplers.TopPSampler: ("temperature", "p"),
}


def check_sampler(sampler: Any, purpose: str | None = None) -> None:
    """Says so when a sampler can't be used by `generate`.

    Args:
        sampler: what the model was compiled with, or `None`.
        purpose: str or `None`. What needs a sampler that chooses one token
            after the other, if it does.

    Raises:
        ValueError: if there is none, it is one that `generate` does not drive
            or that does not serve `purpose`, or its temperature or `p` is not
            positive: KerasHub would divide by zero, or let the first token
            through only.
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
    if purpose is not None and has_own_loop(sampler):
        raise ValueError(
            f"`{type(sampler).__name__}` searches for one whole continuation by "
            f"itself, which does not go with {purpose}. Compile with a sampler that "
            "chooses one token after the other, such as 'greedy' or 'top_p'."
        )


def has_own_loop(sampler: Any) -> bool:
    """Whether a sampler searches by itself, as beam search does."""
    return type(sampler).__call__ is not _samplers.Sampler.__call__


def number_settings(sampler: Any) -> dict[str, Any]:
    """The numbers that a compiled step takes as arguments.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.

    Returns:
        A dict from attributes to float32 scalars.
    """
    settings = {}
    for name in _NUMBERS.get(type(sampler), ()):
        value = getattr(sampler, name, None)
        if isinstance(value, numbers.Real):
            settings[name] = np.float32(value)
    return settings


@contextlib.contextmanager
def with_settings(sampler: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Puts tensors in the place of a sampler's numbers while a step is traced."""
    own = {name: getattr(sampler, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(sampler, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(sampler, name, value)


def compiled_settings(sampler: Any) -> tuple[list[Any], list[Any]]:
    """The attributes of a sampler that a compiled step has in it.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.

    Returns:
        What is compared by value, and what is compared by identity.
    """
    values: list[Any] = []
    objects: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, (list, tuple)):
            values.append(len(value))
            for item in value:
                add(item)
        elif isinstance(value, np.ndarray):
            # The printed form of a large array leaves most of it out.
            values.append((value.dtype.str, value.shape, value.tobytes()))
        elif value is None or isinstance(value, (bool, str, bytes, numbers.Number)):
            values.append((type(value).__name__, repr(value)))
        else:
            objects.append(value)

    arguments = number_settings(sampler)
    add(
        {
            name: value
            for name, value in sorted(vars(sampler).items())
            if not name.startswith("_") and name not in arguments
        }
    )
    return values, objects
