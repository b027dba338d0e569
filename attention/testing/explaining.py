"""Guesses at why decoding differs from the full forward pass, and tests of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import tree

from attention.contract.types import Cache
from attention.testing.backends import to_numpy
from attention.testing.comparing import Difference, ranges
from attention.testing.contract_checks import leaf_name
from attention.testing.probe import Outputs, Probe, join, part


def explain_steps(probe: Probe, found: Difference, caches: list[Cache]) -> str:
    """Returns what a wrong prefill or wrong single tokens have in common.

    Args:
        probe: the object, and how it is called.
        found: the comparison with the full forward pass.
        caches: the caches after the prefill and after each token.
    """
    size, wrong = probe.size, found.positions
    lines = [f"Wrong positions: {ranges(wrong)} of 0-{len(wrong) - 1}."]
    for path, new in tree.flatten_with_path(caches[-1]):
        if not to_numpy(new).any():
            lines.append(f"{leaf_name(path)} was never written: it is all zeros.")
    if wrong[:size].any():
        lines.append(
            f"The prefill of {size} tokens is wrong already: with a cache and index "
            "0 a call must do what it does without one, whatever the capacity of "
            "the cache; slots that are not filled yet must not be attended."
        )
    else:
        lines.append(
            f"The prefill (0-{size - 1}) is right, so what a later call takes from "
            "the cache or computes from `cache_update_index` is wrong."
        )
        lines.extend(_guess(probe, int(np.argmax(wrong)), caches))
    return "\n  ".join(lines)


def _guess(probe: Probe, position: int, caches: list[Cache]) -> list[str]:
    """Tries what usually goes wrong on the first token that is wrong."""
    token, past = part(probe.inputs, position, 1), part(probe.inputs, 0, position)
    cache, index = caches[position - probe.size], np.asarray(position)
    actual, _ = probe.step(token, cache, index)
    expected = part(probe.expected, position, 1)

    guesses: list[tuple[str, Callable[[], Outputs], Any]] = [
        (
            "The output is that of the token alone: the past in the cache plays no "
            "role.",
            lambda: probe.full(token),
            actual,
        ),
        (
            "The output is that of a sequence in which this token comes twice: it is "
            "processed twice.",
            lambda: probe.full(join(past, token, token)),
            actual,
        ),
        *(
            (
                f"With `cache_update_index` one {what} the output would be right: a "
                "position is miscounted by one.",
                lambda shift=shift: probe.step(token, cache, index + shift)[0],
                expected,
            )
            for shift, what in ((1, "larger"), (-1, "smaller"))
        ),
    ]
    for text, outputs, wanted in guesses:
        # A guess that can't be tried explains nothing.
        with contextlib.suppress(Exception):
            last = [x[:, -1:] for x in outputs()]
            if not probe.compare(last, wanted, slack=10.0):
                return [text]
    return []
