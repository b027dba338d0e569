"""Checks that a layer with a cache computes what it computes without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops, tree

from attention.contract.types import Cache
from attention.testing.backends import to_numpy
from attention.testing.contract_checks import leaf_name
from attention.testing.probe import (
    INT,
    ROWS,
    SCALAR,
    Difference,
    Outputs,
    Probe,
    ranges,
)
from attention.testing.sequences import join, part

_SAME = (
    "With a cache, the outputs must be those of one call over the whole sequence "
    "without a cache. They are not "
)


def check_prefill_and_steps(probe: Probe) -> None:
    """A prefill, then single tokens, equal the full forward pass."""
    size = probe.size
    steps = [size] + [1] * (probe.length - size)
    # A layer may handle ints differently from tensors; two of them are enough.
    for kinds in ((INT, INT, INT, SCALAR), (ROWS,)):
        outputs, caches = probe.run(probe.inputs, steps, kinds)

        def advice(found: Difference, caches: list = caches) -> str:
            return _explain_steps(probe, found, caches)

        later = " at first, then a scalar tensor" if kinds[0] == INT else ""
        claim = (
            f"{_SAME}when a prefill of {size} tokens is followed by single tokens "
            f"(`cache_update_index` is {kinds[0]}{later})."
        )
        probe.require(claim, probe.compare(outputs, probe.expected), advice)


def _explain_steps(probe: Probe, found: Difference, caches: list[Cache]) -> str:
    """Returns what a wrong prefill or wrong single tokens have in common.

    `caches` are those after the prefill and after each token.
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

    def shifted(shift: int) -> Outputs:
        return probe.step(token, cache, index + shift)[0]

    off_by_one = (
        "With `cache_update_index` one {} the output would be right: a position is "
        "miscounted by one."
    )
    guesses: dict[str, tuple[Callable[[], Outputs], Any]] = {
        "The output is that of the token alone: the past in the cache plays no role.": (
            lambda: probe.full(token),
            actual,
        ),
        "The output is that of a sequence in which this token comes twice: it is "
        "processed twice.": (lambda: probe.full(join(past, token, token)), actual),
        off_by_one.format("larger"): (lambda: shifted(1), expected),
        off_by_one.format("smaller"): (lambda: shifted(-1), expected),
    }
    for text, (outputs, wanted) in guesses.items():
        # A guess that can't be tried explains nothing.
        with contextlib.suppress(Exception):
            last = [x[:, -1:] for x in outputs()]
            if not probe.compare(last, wanted, slack=10.0):
                return [text]
    return []


def check_chunks(probe: Probe) -> None:
    """Chunks of any sizes equal the full forward pass."""
    length = probe.length
    rng = np.random.default_rng([probe.subject.seed, 3])
    cuts = np.sort(rng.choice(np.arange(1, length), 2, replace=False))
    plans = [([1] * length, SCALAR)]
    for size, kind in ((3, ROWS), (7, SCALAR)):
        whole, rest = divmod(length, size)
        plans.append(([size] * whole + [rest] * (rest > 0), kind))
    plans.append((np.diff([0, *cuts, length]).tolist(), ROWS))
    for sizes, kind in plans:
        if max(sizes) == 1:
            outputs = probe.token_by_token[0]
        else:
            outputs, _ = probe.run(probe.inputs, sizes, (kind,))
        found = probe.compare(outputs, probe.expected)
        starts = np.isin(np.arange(length), np.cumsum([0, *sizes]))
        probe.require(
            f"{_SAME}when the sequence is processed in chunks of {sizes} tokens "
            f"(`cache_update_index` is {kind}).",
            found,
            f"Wrong positions: {ranges(found.positions)}; the chunks start at "
            f"{ranges(starts)}. Within a chunk the tokens see the past and each "
            "other: the mask between them is by positions (query position = "
            "`cache_update_index` + offset), and the state after a chunk is that "
            "after its last token.",
        )


def check_positions(probe: Probe) -> None:
    """Rows of one batch may stand at different positions."""
    # Different numbers of tokens, with room for five more.
    index = (np.arange(probe.rows) * 5 + 2) % max(1, probe.length - 5)
    cache = _cache_at(probe, index)
    for size in (1, 1, 3):
        if index.max() + size > probe.length:
            break
        found, cache = probe.compare_rows(cache, index, size)
        probe.require(
            f"{_SAME}when the rows stand at different positions: {size} more tokens "
            f"with `cache_update_index={index.tolist()}`, one entry per row.",
            found,
            f"{found.rows} Each row reads, writes and counts positions by its own "
            "entry: positions are of shape (batch, length) then, and a write is no "
            "slice at one place for all rows.",
        )
        index = index + size


def _cache_at(probe: Probe, starts: np.ndarray) -> Any:
    """Returns a cache whose rows have processed different numbers of tokens."""
    caches = [probe.create_cache(), *probe.token_by_token[1]]

    def pick(*leaves: Any) -> Any:
        rows = [leaves[start][row : row + 1] for row, start in enumerate(starts)]
        return ops.concatenate(rows, axis=0)

    return tree.map_structure(pick, *caches) if tree.flatten(caches[0]) else caches[0]


def check_capacity(probe: Probe) -> None:
    """The unused room of a cache plays no role."""
    subject, length, size = probe.subject, probe.length, probe.size
    larger = min(2 * length, subject.limit(probe.made) or 2 * length)

    def check_next(cache: Cache, claim: str, advice: str) -> None:
        outputs, _ = probe.step(probe.token, cache, np.asarray(size))
        expected = part(probe.expected, size, 1)
        probe.require(claim, probe.compare(outputs, expected, None, size), advice)

    check_next(
        probe.step(probe.head, probe.create_cache(larger), 0)[1],
        f"{_SAME}with a cache for {larger} positions, for a sequence of {length}.",
        "Slots that were not written yet must not be attended, and nothing may be "
        "computed from the size of the cache: compare the slots' positions with the "
        "queries'.",
    )
    _, cache = probe.step(probe.head, probe.create_cache(size), 0)
    subject.doing = f"asked for `grow_cache(cache, {length})`"
    check_next(
        subject.grow_cache(probe.made, cache, length),
        f"{_SAME}after a full cache of {size} positions was grown to {length} with "
        "`grow_cache`.",
        "The default `grow_cache` copies every tensor to the origin of a larger one. "
        "A layer whose slots move with the capacity overrides it.",
    )
    _check_past_the_end(probe)


def _check_past_the_end(probe: Probe) -> None:
    """A padded chunk may reach beyond the cache; its real tokens don't."""
    rows, length = probe.rows, probe.length
    new = np.resize([3, 1, 1], rows)
    index = length - np.resize([3, 1, 2], rows)
    cache = _cache_at(probe, index)
    # Three tokens; then the rows that are not full yet go on, and the full ones rest.
    for width, real in ((3, new), (1, (index + new < length).astype(int))):
        mask = np.arange(width) < real[:, None]
        found, cache = probe.compare_rows(cache, index, width, mask)
        probe.require(
            f"{_SAME}when {width} tokens reach past the end of a cache of {length} "
            f"positions: {real.tolist()} of them are real in the rows, which stand "
            f"at {index.tolist()}; the others are padding.",
            found,
            f"{found.rows} `slice_update` moves a slice that does not fit to the "
            "front, over live slots. Write only the real tokens, each to its own "
            "slot.",
        )
        index = np.minimum(index + new, length - 1)
