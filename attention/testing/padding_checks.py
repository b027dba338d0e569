"""Checks of padded tokens: they are no-ops, and what stands in them is not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import tree

from attention.testing.backends import to_numpy
from attention.testing.comparing import Difference, ranges
from attention.testing.contract_checks import leaf_name
from attention.testing.failure import ConformanceError
from attention.testing.probe import INT, ROWS, Probe, as_index, gather, part, replace
from attention.testing.subjects import (
    LayerSubject,
    Subject,
    call_parameters,
    takes_padding_mask,
)

# How much larger than real tokens the contents of padded ones are.
_LOUD = 100.0


def loud(inputs: Any, other: Any, mask: np.ndarray) -> Any:
    """Puts something else, and large, into the padded tokens."""

    def amplify(x: np.ndarray) -> np.ndarray:
        return x * _LOUD if x.dtype.kind == "f" else x

    return replace(inputs, tree.map_structure(amplify, other), ~mask)


def ragged_mask(rows: int, length: int) -> np.ndarray:
    """The first row is full, each next one has about half of the last."""
    lengths = np.maximum(1, length // 2 ** np.arange(rows))
    return np.arange(length)[None] < lengths[:, None]


def check_masked_rows(subject: Subject, probe: Probe) -> float:
    """Queries that may attend to nothing give finite outputs."""
    rows, length, size = subject.batch_size, subject.length, subject.prefill_size
    _require_padding_mask(probe, "masked_rows")
    mask = np.ones((rows, length), bool)
    mask[-1] = False
    _finite(probe, probe.full(probe.inputs, mask), "a call without a cache")
    head = part(probe.inputs, 0, size)
    outputs, cache = probe.step(head, probe.create_cache(), 0, mask[:, :size])
    _finite(probe, outputs, "a prefill")
    for path, leaf in tree.flatten_with_path(cache):
        _finite(probe, [to_numpy(leaf)], "a prefill", leaf_name(path))
    if isinstance(subject, LayerSubject):
        parameters = call_parameters(probe.made)
        if "attention_mask" in parameters:
            _check_attention_mask(subject, probe)
    return 0.0


def _check_attention_mask(subject: LayerSubject, probe: Probe) -> None:
    rows, length = subject.batch_size, subject.length
    rng = np.random.default_rng([subject.seed, 4])
    mask = rng.random((rows, length, length)) < 0.5
    mask[:, 0] = False
    mask[-1] = False
    outputs = probe.full(probe.inputs, attention_mask=mask)
    _finite(probe, outputs, "a call with an `attention_mask`")


def _finite(
    probe: Probe, arrays: list[np.ndarray], call: str, what: str = "the outputs"
) -> None:
    for array in arrays:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))[0].tolist()
            raise ConformanceError(
                "masked_rows",
                f"In {call} of {probe}, in which a row is padding alone or may "
                f"attend to nothing, {what} must be finite; at index {bad} stands "
                f"{array[tuple(bad)]}.\n  A softmax over nothing but -inf is NaN: "
                "mask with a large finite negative number, in float32, or replace "
                "the outputs of such queries.",
                np.inf,
            )


def _require_padding_mask(probe: Probe, check: str) -> None:
    if not takes_padding_mask(probe.made):
        raise ConformanceError(
            check,
            f"`call` of {probe} has no argument `padding_mask`, so right-padded "
            "prompts of different lengths can't share a batch. Add "
            "`padding_mask=None` to it, and leave out the tokens for which it is "
            "false (`attention.last_tokens` helps a recurrent layer).",
        )


def check_padding(subject: Subject, probe: Probe) -> float:
    """A padded token enters no state, is attended by nobody, moves no position."""
    _require_padding_mask(probe, "padding")
    rows, length = subject.batch_size, subject.length
    mask = ragged_mask(rows, length)
    padded = loud(probe.inputs, probe.other_inputs, mask)
    found = probe.compare(probe.full(padded, mask), probe.expected, mask)
    claim = (
        "Without a cache, the outputs of real tokens must not depend on the padded "
        f"ones behind them. The rows have {mask.sum(axis=1).tolist()} real tokens "
        f"of {length}, and `padding_mask` says so."
    )
    advice = (
        "Padded tokens stand on the right, where a causal layer doesn't look; "
        "something here does: a sum, mean or norm over the sequence."
    )
    worst = probe.require("padding", claim, found, advice)
    for kind in (INT, ROWS):
        worst = max(worst, _padded_prefill(subject, probe, kind))
    return worst


def _padded_prefill(subject: Subject, probe: Probe, kind: str) -> float:
    rows, length, size = subject.batch_size, subject.length, subject.prefill_size
    mask = ragged_mask(rows, size)
    head = part(probe.inputs, 0, size)
    other = part(probe.other_inputs, 0, size)
    index = mask.sum(axis=1)
    worst = 0.0

    def continued(head: Any) -> list:
        """Outputs of a padded prefill, a padded chunk and a token."""
        start = as_index(kind, 0, rows)
        outputs, cache = probe.step(head, probe.create_cache(), start, mask)
        calls = [(outputs, np.zeros(rows, int), mask)]
        position = index.copy()
        # In the chunk some rows are padding alone: they rest.
        for new in (np.array([3, 1, 0])[np.arange(rows) % 3], np.ones(rows, int)):
            width = int(new.max())
            if (position + new).max() > length:
                break
            real = np.arange(width)[None] < new[:, None]
            columns = np.minimum(position[:, None] + np.arange(width), length - 1)
            chunk = gather(probe.inputs, columns)
            chunk = loud(chunk, gather(probe.other_inputs, columns), real)
            given = real if width > 1 else None
            outputs, cache = probe.step(chunk, cache, position, given)
            calls.append((outputs, position, real))
            position = position + new
        return calls

    calls = continued(loud(head, other, mask))
    for number, (outputs, position, real) in enumerate(calls):
        width = real.shape[1]
        columns = np.minimum(position[:, None] + np.arange(width), length - 1)
        expected = gather(probe.expected, columns)
        found = probe.compare(outputs, expected, real, position)
        call = ("the padded prefill", "a padded chunk after it", "a token after it")
        claim = (
            "With a cache, a padded token must be a no-op. After a prefill of "
            f"{size} tokens, of which {index.tolist()} are real in the rows (index "
            f"0 given as {kind}), the outputs of real tokens are not those of the "
            f"sequence without padding, in {call[number]}."
        )

        def advice(found: Difference, number: int = number) -> str:
            return _explain(probe, found, calls, continued(head), number)

        worst = max(worst, probe.require("padding", claim, found, advice))
    return worst


def _explain(
    probe: Probe, found: Difference, loud_calls: list, quiet_calls: list, number: int
) -> str:
    """Whether the contents of padded tokens matter, or their being there."""
    outputs, _, real = loud_calls[number]
    seen = probe.compare(outputs, quiet_calls[number][0], real)
    rows = f"Rows that are wrong: {ranges(found.wrong_rows)}. "
    if seen:
        return rows + (
            "With other contents of the padded tokens the outputs are others: they "
            "are seen. They enter a state or a running sum, or are attended. Leave "
            "out the tokens for which `padding_mask` is false: put zeros in their "
            "place, with a decay of one, and take the state after the last real one."
        )
    return rows + (
        "What stands in the padded tokens plays no role, but that they are there "
        "does: they are counted as positions, decay a state, or are written over "
        "slots that are still needed."
    )
