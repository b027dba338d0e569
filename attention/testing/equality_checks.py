"""Checks that a layer with a cache computes what it computes without one."""

from __future__ import annotations

import numpy as np
from keras import ops, tree

from attention.testing.comparing import Difference, ranges
from attention.testing.explaining import explain_steps
from attention.testing.probe import INT, ROWS, SCALAR, Probe, gather, part
from attention.testing.subjects import Subject

_SAME = (
    "With a cache, the outputs must be those of one call over the whole sequence "
    "without a cache. They are not "
)


def check_prefill_and_steps(subject: Subject, probe: Probe) -> float:
    """A prefill, then single tokens, equal the full forward pass."""
    length, size = subject.length, subject.prefill_size
    steps = [size] + [1] * (length - size)
    worst = 0.0
    # Ints take other ways through a layer than tensors do; two are enough.
    for kinds in ((INT, INT, INT, SCALAR), (ROWS,)):
        outputs, _, caches = probe.run(probe.inputs, steps, kinds)
        found = probe.compare(outputs, probe.expected)
        first = kinds[0]
        claim = (
            f"{_SAME}when a prefill of {size} tokens is followed by single tokens "
            f"(`cache_update_index` is {first}"
            f"{' at first, then a scalar tensor' if first == INT else ''})."
        )

        def advice(found: Difference, caches: list = caches) -> str:
            return explain_steps(probe, found, size, caches)

        worst = max(worst, probe.require("prefill_and_steps", claim, found, advice))
    return worst


def check_chunks(subject: Subject, probe: Probe) -> float:
    """Chunks of any sizes equal the full forward pass."""
    length, worst = subject.length, 0.0
    rng = np.random.default_rng([subject.seed, 3])
    cuts = np.sort(rng.choice(np.arange(1, length), 2, replace=False))
    random_sizes = np.diff([0, *cuts, length]).tolist()
    plans = [([1] * length, SCALAR, "of one token")]
    for size, kind in ((3, ROWS), (7, SCALAR)):
        sizes = [size] * (length // size) + [length % size] * (length % size > 0)
        plans.append((sizes, kind, f"of {size} tokens"))
    plans.append((random_sizes, ROWS, f"of {random_sizes} tokens"))
    for sizes, kind, what in plans:
        if max(sizes) == 1:
            outputs = probe.token_by_token[0]
        else:
            outputs, _, _ = probe.run(probe.inputs, sizes, (kind,))
        found = probe.compare(outputs, probe.expected)
        starts = np.cumsum([0, *sizes[:-1]])
        first_wrong = int(np.argmax(found.wrong_positions))
        at_start = first_wrong in starts
        advice = (
            f"Wrong positions: {ranges(found.wrong_positions)}; the chunks start "
            f"at {ranges(np.isin(np.arange(length), starts))}. The first wrong one "
            f"is {'the first' if at_start else 'inside'} of a chunk. Inside of a "
            "chunk the tokens see the past and each other: the mask between them "
            "is by positions (query position = `cache_update_index` + offset), and "
            "the state after a chunk is that after its last token."
        )
        claim = (
            f"{_SAME}when the sequence is read in chunks {what} "
            f"(`cache_update_index` is {kind})."
        )
        worst = max(worst, probe.require("chunks", claim, found, advice))
    return worst


def check_positions(subject: Subject, probe: Probe) -> float:
    """Rows of one batch may stand at different positions."""
    rows, length = subject.batch_size, subject.length
    starts = _ragged_starts(rows, length)
    # Each row's past was absorbed by itself, so no padding is needed here.
    cache = _cache_at(probe, starts)
    worst, index = 0.0, starts.copy()
    for size in (1, 1, 3):
        if index.max() + size > length:
            break
        positions = index[:, None] + np.arange(size)[None]
        outputs, cache = probe.step(gather(probe.inputs, positions), cache, index)
        expected = gather(probe.expected, positions)
        found = probe.compare(outputs, expected, positions=index)
        claim = (
            f"{_SAME}when the rows stand at different positions: {size} more "
            f"tokens with `cache_update_index={index.tolist()}`, one entry per row."
        )
        advice = (
            f"Rows that are wrong: {ranges(found.wrong_rows)}. Each row "
            "reads, writes and counts positions by its own entry: positions are of "
            "shape (batch, length) then, and a write is no slice at one place for "
            "all rows."
        )
        worst = max(worst, probe.require("positions", claim, found, advice))
        index = index + size
    return worst


def _ragged_starts(rows: int, length: int) -> np.ndarray:
    """Different numbers of absorbed tokens, with room for five more."""
    return (np.arange(rows) * 5 + 2) % max(1, length - 5)


def _cache_at(probe: Probe, starts: np.ndarray) -> tuple:
    """A cache whose rows have absorbed different numbers of tokens."""
    _, _, caches = probe.token_by_token
    caches = [probe.create_cache(), *caches]

    def pick(*leaves: object) -> object:
        chosen = [leaves[start][row : row + 1] for row, start in enumerate(starts)]
        return ops.concatenate(chosen, axis=0)

    if not tree.flatten(caches[0]):
        return caches[0]
    return tree.map_structure(pick, *caches)


def check_capacity(subject: Subject, probe: Probe) -> float:
    """What a cache could hold beyond the sequence plays no role."""
    length, size, worst = subject.length, subject.prefill_size, 0.0
    head, token = part(probe.inputs, 0, size), part(probe.inputs, size, 1)
    expected = [x[:, size : size + 1] for x in probe.expected]
    limit = subject.limit(probe.made)
    larger = 2 * length if limit is None else min(2 * length, limit)
    _, cache = probe.step(head, probe.create_cache(larger), 0)
    outputs, _ = probe.step(token, cache, np.asarray(size))
    found = probe.compare(outputs, expected, positions=size)
    claim = f"{_SAME}with a cache for {larger} positions, for a sequence of {length}."
    advice = (
        "Slots that were not written yet must not be attended, and nothing may be "
        "computed from the size of the cache: compare the slots' positions with "
        "the queries'."
    )
    worst = max(worst, probe.require("capacity", claim, found, advice))

    _, cache = probe.step(head, probe.create_cache(size), 0)
    probe.doing = f"asked for `grow_cache(cache, {length})`"
    cache = subject.grow_cache(probe.made, cache, length)
    outputs, _ = probe.step(token, cache, np.asarray(size))
    found = probe.compare(outputs, expected, positions=size)
    claim = (
        f"{_SAME}after a full cache of {size} positions was grown to {length} with "
        "`grow_cache`."
    )
    advice = (
        "The default `grow_cache` copies every tensor to the origin of a larger "
        "one. A layer whose slots move with the capacity overrides it."
    )
    worst = max(worst, probe.require("capacity", claim, found, advice))
    return max(worst, _past_the_end(subject, probe))


def _past_the_end(subject: Subject, probe: Probe) -> float:
    """A padded chunk may reach beyond the cache, its real tokens don't."""
    rows, length = subject.batch_size, subject.length
    new = np.array([3, 1, 1])[np.arange(rows) % 3]
    starts = np.array([length - 3, length - 1, length - 2])[np.arange(rows) % 3]
    if starts.min() < 1:
        return 0.0
    positions = starts[:, None] + np.arange(3)[None]
    mask = np.arange(3)[None] < new[:, None]
    cache = _cache_at(probe, starts)
    inside = np.minimum(positions, length - 1)
    outputs, cache = probe.step(gather(probe.inputs, inside), cache, starts, mask)
    expected = gather(probe.expected, inside)
    found = probe.compare(outputs, expected, mask, starts)
    claim = (
        f"{_SAME}when three tokens reach past the end of a cache of {length} "
        f"positions: {new.tolist()} of them are real in the rows, which stand at "
        f"{starts.tolist()}; the others are padding."
    )
    advice = (
        f"Rows that are wrong: {ranges(found.wrong_rows)}. `slice_update` "
        "moves a slice that does not fit to the front, over live slots. Write only "
        "the real tokens, each to its own slot."
    )
    worst = probe.require("capacity", claim, found, advice)
    # The rows that are not full yet go on; the full ones rest.
    last = np.full((rows, 1), length - 1)
    mask = (starts + new < length)[:, None]
    index = np.minimum(starts + new, length - 1)
    if not mask.any():
        return worst
    outputs, _ = probe.step(gather(probe.inputs, last), cache, index, mask)
    expected = [x[:, -1:] for x in probe.expected]
    found = probe.compare(outputs, expected, mask, length - 1)
    claim = f"{_SAME}for the token after such a chunk."
    return max(worst, probe.require("capacity", claim, found, advice))
