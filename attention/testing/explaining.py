"""Guesses at why decoding differs from the full forward pass, and tests of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import tree

from attention.testing.backends import to_numpy
from attention.testing.comparing import Difference, ranges
from attention.testing.contract_checks import leaf_name
from attention.testing.probe import Probe, part


def explain_steps(probe: Probe, found: Difference, size: int, caches: list) -> str:
    """Says what a wrong prefill or wrong single tokens have in common.

    Args:
        probe: the object, and how it is called.
        found: the comparison with the full forward pass.
        size: int. The length of the prefill.
        caches: the caches after the prefill and after each token.
    """
    wrong = found.wrong_positions
    length = len(wrong)
    lines = [f"Wrong positions: {ranges(wrong)} of 0-{length - 1}."]
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
    lines.extend(_unwritten(caches))
    if not wrong[:size].any():
        lines.extend(_guesses(probe, int(np.argmax(wrong)), size, caches))
    return "\n  ".join(lines)


def _unwritten(caches: list) -> list[str]:
    """The tensors of a cache that no call has written to."""
    before, after = caches[0], caches[-1]
    named = [leaf_name(path) for path, _ in tree.flatten_with_path(after)]
    pairs = zip(named, tree.flatten(before), tree.flatten(after))
    lines = []
    for name, old, new in pairs:
        if not to_numpy(new).any():
            lines.append(f"{name} was never written: it is all zeros at the end.")
        elif np.array_equal(to_numpy(old), to_numpy(new)):
            lines.append(f"{name} was written by the prefill, and by no call after it.")
    return lines


def _guesses(probe: Probe, position: int, size: int, caches: list) -> list[str]:
    """Tries what usually goes wrong on the first token that is wrong."""
    token = part(probe.inputs, position, 1)
    past = part(probe.inputs, 0, position)
    cache = caches[position - size]
    index = np.asarray(position)
    actual, _ = probe.step(token, cache, index)

    def matches(outputs: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
        return not probe.compare([x[:, -1:] for x in outputs], wanted, slack=10.0)

    expected = [x[:, position : position + 1] for x in probe.expected]
    join = _join
    guesses: list[tuple[str, Any]] = [
        (
            "The output is that of the token alone: the past in the cache plays no "
            "role.",
            lambda: matches(probe.full(token), actual),
        ),
        (
            "The output is that of a sequence in which this token comes twice: it is "
            "absorbed twice.",
            lambda: matches(probe.full(join(past, token, token)), actual),
        ),
        (
            "The output is that of a sequence in which the last token of the past "
            "comes twice: it was absorbed twice.",
            lambda: matches(
                probe.full(join(past, part(probe.inputs, position - 1, 1), token)),
                actual,
            ),
        ),
        (
            "The output is that of a sequence without its first token: the oldest "
            "token is lost one step too early.",
            lambda: matches(probe.full(join(part(past, 1, position), token)), actual),
        ),
        (
            "With `cache_update_index` one larger the output would be right: a "
            "position is counted one too low.",
            lambda: matches(probe.step(token, cache, index + 1)[0], expected),
        ),
        (
            "With `cache_update_index` one smaller the output would be right: a "
            "position is counted one too high.",
            lambda: matches(probe.step(token, cache, index - 1)[0], expected),
        ),
    ]
    for text, holds in guesses:
        try:
            if holds():
                return [text]
        except Exception:
            # A guess that can't be tried explains nothing.
            continue
    return []


def _join(*parts: Any) -> Any:
    return tree.map_structure(lambda *x: np.concatenate(x, axis=1), *parts)
