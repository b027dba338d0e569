"""The check of packed rows: documents that share a row don't see each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from attention.contract.cached_layer import CachedLayer
from attention.contract.calls import parameters
from attention.testing.probe import Probe
from attention.testing.sequences import gather, replace

_ADVICE = (
    "Where `segment_ids` change, forget what came before, and count positions from "
    "there on (`attention.token_positions` takes `segment_ids`)."
)


def packs(layers: Iterable[CachedLayer]) -> bool:
    """Returns whether layers, and all within them, can be called on packed rows."""
    return all(
        "segment_ids" in parameters(type(x).call) and packs(x.inner_layers())
        for x in layers
    )


def check_packing(probe: Probe) -> None:
    """Documents that share a row have the outputs that each has alone."""
    rows, length = probe.rows, probe.length
    # Three documents in each row, which begin elsewhere in each.
    first = length // 4 + np.arange(rows) % 2
    second = length // 2 + 1 + np.arange(rows) % 2
    columns = np.arange(length)
    segments = 1 + (columns >= first[:, None]) + (columns >= second[:, None])
    segments = segments.astype("int32")
    packed = probe.full(probe.inputs, segment_ids=segments)
    ends = np.stack([0 * first, first, second, 0 * first + length])
    for start, end in itertools.pairwise(ends):
        places = np.minimum(start[:, None] + columns, length - 1)
        # What comes after the document plays no role.
        alone = probe.full(gather(probe.inputs, places))
        real = columns < (end - start)[:, None]
        probe.require(
            "In rows of several documents (`SegmentScope`), each must have the outputs "
            f"that it has alone. It does not, from positions {start.tolist()} of the "
            "rows on.",
            probe.compare(gather(packed, places), alone, real, start),
            _ADVICE,
        )
    others = replace(probe.inputs, probe.other_inputs, segments == 2)
    probe.require(
        "Another document in the row must change nothing at all.",
        probe.compare(
            probe.full(others, segment_ids=segments), packed, segments != 2, slack=0.0
        ),
        _ADVICE,
    )
