"""The check that tokens which were taken back leave no trace in a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np

from attention.contract.arguments import describe
from attention.contract.types import Cache
from attention.testing.probe import INT, SCALAR, Difference, Probe, as_index
from attention.testing.sequences import join, part, replace


def check_rewind(probe: Probe) -> None:
    """A cache that can be rewound, by `can_rewind`, serves as one that saw less."""
    subject, size = probe.subject, probe.size
    can_rewind = subject.can_rewind(probe.made)
    caches = [probe.create_cache(), *probe.token_by_token[1]]

    def claims(end: int, start: int) -> bool:
        subject.doing = f"asked for `can_rewind(cache, {end}, {start})`"
        answer = can_rewind(caches[end], end, start)
        if not isinstance(answer, bool):
            subject.fail(
                f"`can_rewind(cache, {end}, {start})` of {subject} must return True "
                "or False, without looking into a tensor: it decides which loop is "
                f"run. It returned {describe(answer)}."
            )
        return answer

    if not claims(size, size):
        subject.fail(
            f"`can_rewind(cache, {size}, {size})` of {subject} is False, but where "
            "nothing is taken back, every cache serves as what it is. Return True "
            "where `from_index == to_index`, as `super().can_rewind(...)` does."
        )
    for end, start in _choose(probe.length, size, claims):
        _check_alike(probe, caches[start], end, start)
        _check_row_by_row(probe, caches[start], end, start)


def _choose(
    length: int, size: int, claims: Callable[[int, int], bool]
) -> list[tuple[int, int]]:
    """Returns pairs `(end, start)` that can be rewound by `can_rewind`.

    A window gives tokens back until it drops some. Where that is can't be seen
    from outside, so besides an ordinary case the furthest way back and the
    latest one are tried. Not all the way to 0, where no past is needed.
    """
    chosen = [pair for pair in ((2 * size, size), (size, 0)) if claims(*pair)]
    furthest = []
    for end in range(2, length + 1):
        start = next((x for x in range(1, end) if claims(end, x)), None)
        if start is not None:
            furthest.append((end, start))
    if furthest:
        chosen.append(max(furthest, key=lambda pair: (pair[0] - pair[1], pair[0])))
        chosen.append(furthest[-1])
    return list(dict.fromkeys(chosen))


def _check_alike(probe: Probe, cache: Cache, end: int, start: int) -> None:
    """All rows take back the same tokens, and go on in a chunk or in steps."""
    count = end - start
    wrong = part(probe.other_inputs, start, count)
    _, spoiled = probe.step(wrong, cache, start)

    def advice(found: Difference) -> str:
        # Are the tokens that were taken back still there?
        with contextlib.suppress(Exception):
            head, token = part(probe.inputs, 0, start), part(probe.inputs, start, 1)
            kept = [x[:, -1:] for x in probe.full(join(head, wrong, token))]
            if not probe.compare(part(outputs, 0, 1), kept, slack=10.0):
                return (
                    "The first output is that of a sequence in which the wrong tokens "
                    "still stand in front of it: they were not taken back. "
                    f"{_WAYS_OUT}"
                )
        return _WAYS_OUT

    # Tokens after a chunk see what it has written, too.
    chunk = [count] + [1] * min(2, probe.length - end)
    single = [1] * min(4, probe.length - start)
    for sizes, kind, how in (
        (chunk, INT, f"in a chunk of {count} and single tokens after it"),
        (single, SCALAR, "in single tokens"),
    ):
        position, cache, parts = start, spoiled, []
        for size in sizes:
            index = as_index(kind if position == start else SCALAR, position, 0)
            inputs = part(probe.inputs, position, size)
            found, cache = probe.step(inputs, cache, index)
            parts.append(found)
            position += size
        outputs = join(*parts)
        expected = part(probe.expected, start, position - start)
        probe.require(
            f"{_claim(end, start)} All rows go on at `cache_update_index={start}`, "
            f"given as {kind}, {how}.",
            probe.compare(outputs, expected, None, start),
            advice,
        )


def _check_row_by_row(probe: Probe, cache: Cache, end: int, start: int) -> None:
    """Each row takes back the tokens from its first wrong one on."""
    length, count = probe.length, end - start
    # With room for the tokens that come then; the last row may take back none.
    index = np.linspace(start, end, probe.rows).astype(int)
    index = np.minimum(index, max(start, length - 4))
    is_wrong = np.arange(start, end) >= index[:, None]
    right, wrong = (part(x, start, count) for x in (probe.inputs, probe.other_inputs))
    _, cache = probe.step(replace(right, wrong, is_wrong), cache, start)
    for size in (1, 3):
        if index.max() + size > length:
            break
        found, cache = probe.compare_rows(cache, index, size)
        probe.require(
            f"{_claim(end, start)} Each row takes back its wrong tokens only and goes "
            f"on, {size} at a time, at `cache_update_index={index.tolist()}`, one "
            "entry per row.",
            found,
            f"{found.rows} {_WAYS_OUT}",
        )
        index = index + size


def _claim(end: int, start: int) -> str:
    return (
        f"`can_rewind(cache, {end}, {start})` is True: a cache that has processed "
        f"{end} positions serves as one that has processed the first {start}. But "
        f"after {end - start} wrong tokens were processed and taken back, the outputs "
        "of the right ones are not those of one call over the whole sequence without "
        "a cache."
    )


_WAYS_OUT = (
    "Either queries see nothing at or after `cache_update_index` but what was written "
    "since, and a write replaces what is in its slot (adding to it is right only "
    "while it is empty); or `can_rewind` returns False, as it does by default. A "
    "state that all tokens enter, and a slot that another position has taken, can't "
    "give back what they held."
)
