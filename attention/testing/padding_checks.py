"""Checks of padded tokens: they are no-ops, and their contents are not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import tree

from attention.testing.backends import to_numpy
from attention.testing.contract_checks import leaf_name
from attention.testing.probe import INT, ROWS, Difference, Probe, as_index
from attention.testing.sequences import gather, part, replace

# How much larger than real tokens the contents of padded ones are.
_LOUD = 100.0
_SEEN = (
    "With other contents of the padded tokens the outputs are others: they are seen. "
    "They enter a state or a running sum, or are attended to. Leave out the tokens for "
    "which `padding_mask` is false: put zeros in their place, with a decay of one, and "
    "take the state after the last real one."
)
_COUNTED = (
    "The contents of padded tokens play no role, but that they are there does: they are "
    "counted as positions, decay a state, or are written over slots that are still "
    "needed."
)


def loud(inputs: Any, other: Any, mask: np.ndarray) -> Any:
    """Puts something else, and large, into the padded tokens."""
    large = tree.map_structure(lambda x: x * _LOUD if x.dtype.kind == "f" else x, other)
    return replace(inputs, large, ~mask)


def ragged_mask(rows: int, length: int) -> np.ndarray:
    """The first row is full, each next one has about half of the last."""
    lengths = np.maximum(1, length // 2 ** np.arange(rows))
    return np.arange(length) < lengths[:, None]


def check_masked_rows(probe: Probe) -> None:
    """Queries that may attend to nothing give finite outputs."""
    rows, length = probe.rows, probe.length
    _require_padding_mask(probe)
    mask = np.ones((rows, length), bool)
    mask[-1] = False
    outputs = probe.full(probe.inputs, mask)
    _require_finite(probe, outputs, "a call without a cache")
    outputs, cache = probe.prefill(probe.head, mask[:, : probe.size])
    _require_finite(probe, outputs, "a prefill")
    for path, leaf in tree.flatten_with_path(cache):
        _require_finite(probe, [to_numpy(leaf)], "a prefill", leaf_name(path))
    if probe.subject.takes("attention_mask"):
        rng = np.random.default_rng([probe.subject.seed, 4])
        mask = rng.random((rows, length, length)) < 0.5
        mask[:, 0] = False
        mask[-1] = False
        outputs = probe.full(probe.inputs, attention_mask=mask)
        _require_finite(probe, outputs, "a call with an `attention_mask`")


def _require_finite(
    probe: Probe, arrays: list[np.ndarray], call: str, what: str = "the outputs"
) -> None:
    for array in arrays:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))[0].tolist()
            probe.subject.fail(
                f"In {call} of {probe.subject}, in which a row is padding alone or "
                f"may attend to nothing, {what} must be finite; at index {bad} "
                f"stands {array[tuple(bad)]}.\n  A softmax over nothing but -inf is "
                "NaN: mask with a large finite negative number, in float32, or "
                "replace the outputs of such queries.",
                np.inf,
            )


def _require_padding_mask(probe: Probe) -> None:
    if not probe.subject.takes("padding_mask"):
        probe.subject.fail(
            f"`call` of {probe.subject} has no argument `padding_mask`, so "
            "right-padded prompts of different lengths can't share a batch. Add "
            "`padding_mask=None` to it, and leave out the tokens for which it is "
            "false (`attention.last_tokens` helps a recurrent layer)."
        )


def check_padding(probe: Probe) -> None:
    """A padded token enters no state, is not attended to, moves no position."""
    _require_padding_mask(probe)
    mask = ragged_mask(probe.rows, probe.length)
    padded = loud(probe.inputs, probe.other_inputs, mask)
    probe.require(
        "Without a cache, the outputs of real tokens must not depend on the padded "
        f"ones after them. By `padding_mask` {mask.sum(axis=1).tolist()} of "
        f"{probe.length} tokens are real in the rows.",
        probe.compare(probe.full(padded, mask), probe.expected, mask),
        "Padded tokens stand on the right, where a causal layer doesn't look; "
        "something here does: a sum, mean or norm over the sequence.",
    )
    for kind in (INT, ROWS):
        _check_padded_prefill(probe, kind)


def _check_padded_prefill(probe: Probe, kind: str) -> None:
    rows, length, size = probe.rows, probe.length, probe.size
    mask = ragged_mask(rows, size)
    head, other = probe.head, part(probe.other_inputs, 0, size)
    start = mask.sum(axis=1)

    def gather_at(inputs: Any, index: np.ndarray, width: int) -> Any:
        columns = np.minimum(index[:, None] + np.arange(width), length - 1)
        return gather(inputs, columns)

    def continued(head: Any) -> list[tuple]:
        """Returns outputs of a padded prefill, a padded chunk and a token."""
        outputs, cache = probe.prefill(head, mask, as_index(kind, 0, rows))
        calls = [(outputs, np.zeros(rows, int), mask)]
        index = start
        # In the chunk some rows are padding alone: they rest.
        for new in (np.resize([3, 1, 0], rows), np.ones(rows, int)):
            width = int(new.max())
            if (index + new).max() > length:
                break
            real = np.arange(width) < new[:, None]
            others = gather_at(probe.other_inputs, index, width)
            chunk = loud(gather_at(probe.inputs, index, width), others, real)
            given = real if width > 1 else None
            outputs, cache = probe.step(chunk, cache, index, given)
            calls.append((outputs, index, real))
            index = index + new
        return calls

    calls = continued(loud(head, other, mask))
    names = ("the padded prefill", "a padded chunk after it", "a token after it")
    for number, (outputs, index, real) in enumerate(calls):
        expected = gather_at(probe.expected, index, real.shape[1])

        def advice(found: Difference, number: int = number) -> str:
            """Says whether the contents of padded tokens matter, or their place."""
            outputs, _, real = calls[number]
            seen = probe.compare(outputs, continued(head)[number][0], real)
            return f"{found.rows} {_SEEN if seen else _COUNTED}"

        probe.require(
            "With a cache, a padded token must be a no-op. After a prefill of "
            f"{size} tokens, of which {start.tolist()} are real in the rows (index 0 "
            f"given as {kind}), the outputs of real tokens are not those of the "
            f"sequence without padding, in {names[number]}.",
            probe.compare(outputs, expected, real, index),
            advice,
        )
