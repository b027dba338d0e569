"""What a model reads beside tokens: an encoder's sources, or embeddings of prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from attention import write_source
from attention.contract import Cache, Tensor, describe
from blocks.generation.compilation import StepKey
from blocks.generation.prompts import read_tokens

# The arrays of a batch of sources by their names, a row each.
Sources = dict[str, np.ndarray]


def read_sources(
    given: dict[str, Any], inputs: dict[str, Any], limit: int | None = None
) -> tuple[Sources, bool]:
    """Reads the sources of a batch.

    Tokens may be lists of rows of different lengths, without a mask; one row may have no
    batch axis.

    Args:
        given: what the user passed, by name.
        inputs: the encoder's symbolic inputs, by name.
        limit: int or `None`. How many tokens the encoder knows positions of.

    Returns:
        The sources, and whether there was one without a batch axis.

    Raises:
        ValueError: if one is missing, has another shape, is too long or all padding; or
            if they have different numbers of rows.
    """
    found: Sources = {}
    single = False
    for name in sorted(inputs, key=_is_mask):
        mask = name.removesuffix("token_ids") + "padding_mask"
        if name in found:
            continue
        if given.get(name) is None:
            raise ValueError(
                f"The source `{name}` is missing. Pass a dict of {_names(inputs)}, or of "
                f"`encoder_text`. Received: inputs={describe(given)}"
            )
        if name.endswith("token_ids"):
            found[name], lengths, single = read_tokens(
                given[name], given.get(mask), name
            )
            if limit is not None and lengths.max() > limit:
                raise ValueError(
                    f"Source {int(lengths.argmax())} has {int(lengths.max())} tokens, and "
                    f"the encoder knows {limit} positions. Received: "
                    f"{name}={describe(given[name])}"
                )
            if mask in inputs:
                width = found[name].shape[1]
                found[mask] = np.arange(width) < lengths[:, None]
            continue
        array = ops.convert_to_numpy(given[name])
        single = array.ndim == len(inputs[name].shape) - 1
        found[name] = array[None] if single else array
    for name, array in found.items():
        expected = tuple(inputs[name].shape)[1:]
        fits = array.ndim == len(expected) + 1 and all(
            size in (None, actual) for size, actual in zip(expected, array.shape[1:])
        )
        if not fits:
            raise ValueError(
                f"`{name}` must have the shape (batch, {', '.join(map(str, expected))}). "
                f"Received: {name}={describe(given[name])}"
            )
        empty = _is_mask(name) and np.logical_not(array.astype(bool).any(axis=-1))
        if np.any(empty):
            raise ValueError(
                f"Source {int(np.argmax(empty))} is all padding, so there is nothing to "
                f"attend to. Received: {name}={describe(given[name])}"
            )
        found[name] = array.astype(inputs[name].dtype)
    rows = {len(x) for x in found.values()}
    if len(rows) > 1:
        raise ValueError(
            "All sources must have as many rows. Received: "
            + ", ".join(f"{name}={describe(x)}" for name, x in found.items())
        )
    return found, single


def rows_of(sources: Sources | None) -> list[Sources]:
    """Returns the sources of each row; an empty list where there are none."""
    count = len(next(iter(sources.values()))) if sources else 0
    return [{name: x[i] for name, x in (sources or {}).items()} for i in range(count)]


def stacked(rows: list[Sources]) -> Sources | None:
    """Returns the sources of rows, of which each may be of another batch."""
    found: Sources = {}
    for name in rows[0] if rows else ():
        length = max(len(row[name]) for row in rows)
        found[name] = np.stack([lengthened(row[name], length) for row in rows])
    return found or None


def extended(
    sources: Sources | None, lengths: Sequence[int], more: Sources | None = None
) -> Sources | None:
    """Returns what is beside the first tokens of rows, and more that comes after them.

    Args:
        sources: arrays `(rows, positions, ...)`, by name.
        lengths: how many tokens of each row to keep them for.
        more: arrays `(rows, positions, ...)`, by the same names.
    """
    found: Sources = {}
    for name, like in (sources or more or {}).items():
        old, new = (x[name] if x else like[:, :0] for x in (sources, more))
        width = max(lengths) + new.shape[1]
        found[name] = np.zeros((len(like), width, *like.shape[2:]), like.dtype)
        for row, length in enumerate(lengths):
            kept = old[row, :length]
            found[name][row, : len(kept)] = kept
            found[name][row, length : length + new.shape[1]] = new[row]
    return found or None


def same_beside(
    sources: Sources | None, others: Sources | None, row: int, length: int
) -> int:
    """Returns beside how many first tokens, of `length`, two sources of a row agree."""
    for name, like in (sources or others or {}).items():
        pair = [
            lengthened(x[name][row, :length] if x else like[row, :0], length)
            for x in (sources, others)
        ]
        differ = pair[0] != pair[1]
        differ = differ.any(axis=tuple(range(1, differ.ndim)))
        length = int(differ.argmax()) if differ.any() else length
    return length


def with_tokens(
    tokens: np.ndarray, sources: Sources | None, engine: Any, starts: Any = None
) -> Any:
    """Returns tokens, in a dict with what is beside them, if there is something.

    Args:
        tokens: array of shape `(rows, width)`.
        sources: what each row has from its first position on, or what an encoder reads.
        engine: its decoder is called on the tokens.
        starts: array `(rows,)`: the positions of the first tokens; `None`: 0.
    """
    if not sources or engine.encoder is not None:
        return tokens
    rows, width = tokens.shape
    starts = np.zeros((rows,), "int32") if starts is None else starts
    found = {
        name: np.stack(
            [lengthened(x[n : n + width], width) for x, n in zip(array, starts)]
        )
        for name, array in sources.items()
    }
    # All of it may have been before.
    any_left = any(x.any() for x in found.values())
    return {"token_ids": tokens, **found} if any_left else tokens


def encode(engine: Any, sources: Sources | None, capacity: int) -> Cache | None:
    """Runs the encoder, and returns a cache that holds the sources and no tokens.

    It is `None`, for a new cache, without sources, or where they are beside the tokens.
    """
    if not sources or engine.encoder is None:
        return None
    longest = max(x.shape[1] for x in sources.values())
    length = engine.sizes.round_up_source(longest)
    if engine.max_source_positions is not None:
        length = max(longest, min(length, engine.max_source_positions))
    sources = _padded(sources, engine.encoder.input, length)
    (rows, length), *_ = (x.shape[:2] for x in sources.values())

    def make(_: Any) -> Callable:
        return functools.partial(_write_source, engine, capacity)

    return engine.functions.run(
        StepKey("encode", rows, capacity, length), make, (sources,)
    )


def _write_source(engine: Any, capacity: int, sources: dict[str, Tensor]) -> Cache:
    states = engine.encoder(sources)
    rows, length = states["encoder_sequence"].shape[:2]
    cache = engine.create_cache(rows, capacity, length)
    return write_source(engine.decoder, states, cache)


def _padded(sources: Sources, inputs: dict[str, Any], length: int) -> Sources:
    """Returns sources padded to a length, if they have a mask and may be of any length."""
    lengths = {x.shape[1] for x in sources.values()}
    masked = any(map(_is_mask, inputs))
    if not masked or len(lengths) > 1 or any(x.shape[1] for x in inputs.values()):
        return sources
    return {name: lengthened(x, length, axis=1) for name, x in sources.items()}


def lengthened(array: np.ndarray, length: int, axis: int = 0) -> np.ndarray:
    """Returns an array with zeros at the end of an axis."""
    more = [(0, 0)] * array.ndim
    more[axis] = (0, length - array.shape[axis])
    return np.pad(array, more)


def widened(tokens: np.ndarray, width: int) -> np.ndarray:
    """Returns tokens with zeros behind them, `(rows, width)`."""
    wide = lengthened(tokens, width, axis=1)
    return wide.astype("int32") if wide.dtype.kind in "iub" else wide


def _is_mask(name: str) -> bool:
    return name.endswith("padding_mask")


def _names(inputs: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in inputs)
