"""The check that tokens which were taken back leave no trace in a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import tree

from attention.contract.arguments import describe
from attention.testing.comparing import Difference, ranges
from attention.testing.failure import ConformanceError
from attention.testing.probe import (
    INT,
    ROWS,
    SCALAR,
    Probe,
    as_index,
    gather,
    part,
    replace,
)
from attention.testing.subjects import Subject


def check_rewind(subject: Subject, probe: Probe) -> float:
    """A cache that says it can be rewound serves as one that saw less."""
    size = subject.prefill_size
    can_rewind = subject.can_rewind(probe.made)
    caches = [probe.create_cache(), *probe.token_by_token[2]]

    def says(end: int, start: int) -> bool:
        probe.doing = f"asked for `can_rewind(cache, {end}, {start})`"
        answer = can_rewind(caches[end], end, start)
        if not isinstance(answer, bool):
            raise ConformanceError(
                "rewind",
                f"`can_rewind(cache, {end}, {start})` of {probe} must return True or "
                "False, without looking into a tensor: it decides which loop is run. "
                f"It returned {describe(answer)}.",
            )
        return answer

    if not says(size, size):
        raise ConformanceError(
            "rewind",
            f"`can_rewind(cache, {size}, {size})` of {probe} is False, but where "
            "nothing is taken back, every cache serves as what it is. Return True "
            "where `from_index == to_index`, as `super().can_rewind(...)` does.",
        )
    worst = 0.0
    for end, start in _claims(subject.length, size, says):
        worst = max(worst, _alike(probe, caches[start], end, start))
        worst = max(worst, _row_by_row(probe, caches[start], end, start))
    return worst


def _claims(
    length: int, size: int, says: Callable[[int, int], bool]
) -> list[tuple[int, int]]:
    """What it says can be done, as `(end, start)`, where it may be wrong.

    A window gives tokens back until it drops some. Where that is nobody knows
    from outside, so besides an ordinary case the furthest way back and the
    latest one are tried. Not all the way to 0, where no past is needed.
    """
    claims = [claim for claim in ((2 * size, size), (size, 0)) if says(*claim)]
    furthest = []
    for end in range(2, length + 1):
        start = next((x for x in range(1, end) if says(end, x)), None)
        if start is not None:
            furthest.append((end, start))
    if furthest:
        claims.append(max(furthest, key=lambda claim: (claim[0] - claim[1], claim[0])))
        claims.append(furthest[-1])
    return list(dict.fromkeys(claims))


def _alike(probe: Probe, cache: Any, end: int, start: int) -> float:
    """All rows take back the same tokens, and go on in a chunk or in steps."""
    length, rows, count = probe.subject.length, probe.subject.batch_size, end - start
    wrong = part(probe.other_inputs, start, count)
    _, spoiled = probe.step(wrong, cache, start)
    # What a chunk writes is seen by the tokens after it, too.
    chunk = [count] + [1] * min(2, length - end)
    single = [1] * min(4, length - start)
    worst = 0.0
    for sizes, kind, how in (
        (chunk, INT, f"in a chunk of {count} and single tokens after it"),
        (single, SCALAR, "in single tokens"),
    ):
        position, cache, parts = start, spoiled, []
        for size in sizes:
            index = as_index(kind if position == start else SCALAR, position, rows)
            outputs, cache = probe.step(
                part(probe.inputs, position, size), cache, index
            )
            parts.append(outputs)
            position += size
        joined = [np.concatenate(x, axis=1) for x in zip(*parts)]
        expected = [x[:, start:position] for x in probe.expected]
        found = probe.compare(joined, expected, positions=start)
        claim = (
            f"{_said(end, start)} All rows go on at `cache_update_index={start}`, "
            f"given as {kind}, {how}."
        )

        def advice(found: Difference, first: list = parts[0]) -> str:
            return _explain(probe, wrong, start, first)

        worst = max(worst, probe.require("rewind", claim, found, advice))
    return worst


def _row_by_row(probe: Probe, cache: Any, end: int, start: int) -> float:
    """Each row takes back the tokens from its first wrong one on."""
    length, rows, count = probe.subject.length, probe.subject.batch_size, end - start
    # With room for the tokens that come then; the last row may take back none.
    index = np.linspace(start, end, rows).astype(int)
    index = np.minimum(index, max(start, length - 4))
    is_wrong = np.arange(start, end)[None] >= index[:, None]
    right, wrong = (part(x, start, count) for x in (probe.inputs, probe.other_inputs))
    _, cache = probe.step(replace(right, wrong, is_wrong), cache, start)
    worst = 0.0
    for size in (1, 3):
        if index.max() + size > length:
            break
        positions = index[:, None] + np.arange(size)[None]
        at = as_index(ROWS, index, rows)
        outputs, cache = probe.step(gather(probe.inputs, positions), cache, at)
        found = probe.compare(outputs, gather(probe.expected, positions), None, index)
        claim = (
            f"{_said(end, start)} Each row takes back its wrong tokens only and goes "
            f"on, {size} at a time, at `cache_update_index={index.tolist()}`, one "
            "entry per row."
        )
        advice = f"Rows that are wrong: {ranges(found.wrong_rows)}. {_WAYS_OUT}"
        worst = max(worst, probe.require("rewind", claim, found, advice))
        index = index + size
    return worst


def _said(end: int, start: int) -> str:
    return (
        f"`can_rewind(cache, {end}, {start})` is True: a cache that has absorbed {end} "
        f"positions serves as one that has absorbed the first {start}. But after "
        f"{end - start} wrong tokens were absorbed and taken back, the outputs of the "
        "right ones are not those of one call over the whole sequence without a cache."
    )


_WAYS_OUT = (
    "Either queries see nothing at or behind `cache_update_index` but what was "
    "written since, and a write replaces what is in its slot (adding to it is right "
    "only while it is empty); or `can_rewind` returns False, as it does by default. "
    "A state that all tokens enter, and a slot that another position has taken, "
    "can't give back what they held."
)


def _explain(probe: Probe, wrong: Any, start: int, outputs: list[np.ndarray]) -> str:
    """Whether the tokens that were taken back are still absorbed."""

    def join(*parts: Any) -> Any:
        return tree.map_structure(lambda *x: np.concatenate(x, axis=1), *parts)

    first = [x[:, :1] for x in outputs]
    try:
        head, token = part(probe.inputs, 0, start), part(probe.inputs, start, 1)
        kept = [x[:, -1:] for x in probe.full(join(head, wrong, token))]
        still_there = not probe.compare(first, kept, slack=10.0)
    except Exception:
        # Longer than it can be, perhaps: then nothing is explained.
        still_there = False
    if not still_there:
        return _WAYS_OUT
    return (
        "The first output is that of a sequence in which the wrong tokens still "
        f"stand in front of it: they were not taken back. {_WAYS_OUT}"
    )
