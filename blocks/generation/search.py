"""Samplers that search by themselves, with KerasHub's own protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from attention import NewCacheScope
from blocks.generation.engine import Engine
from blocks.generation.running_batch import to_numpy
from blocks.generation.token_rows import NO_TOKENS


def search(
    engine: Engine,
    sampler: Any,
    token_ids: np.ndarray,
    lengths: np.ndarray,
    limits: np.ndarray,
    stop_token_ids: tuple[int, ...],
) -> list[np.ndarray]:
    """Continues prompts with a sampler that has a loop of its own.

    It moves all rows in lockstep, and goes on until all have stopped. Rows that
    would disturb each other are given to it one by one.

    Args:
        engine: an `Engine`.
        sampler: a `keras_hub.samplers.Sampler` with its own `__call__`.
        token_ids: `int32` array of shape `(batch, width)`: the prompts.
        lengths: `int32` array `(batch,)`: the lengths of the prompts.
        limits: `int32` array `(batch,)`: the lengths at which rows end.
        stop_token_ids: the tokens at which a row ends; they are part of it.

    Returns:
        The new tokens of each row.
    """
    found: list[np.ndarray] = [NO_TOKENS] * len(lengths)
    for rows in _lockstep_groups(lengths, limits, bool(stop_token_ids)):
        length, limit = lengths[rows[0]], limits[rows[0]]
        if limit <= length:
            continue
        buffer = np.zeros((len(rows), limit), "int32")
        buffer[:, :length] = token_ids[rows, :length]
        run = engine.functions.get(
            ("search", stop_token_ids),
            lambda: _make_search(engine, sampler, stop_token_ids),
            sampler=sampler,
        )
        tokens = to_numpy(run(buffer, np.int32(length)))[:, length:]
        for row, new in zip(rows, tokens):
            stops = np.flatnonzero(np.isin(new, stop_token_ids))
            found[row] = new[: stops[0] + 1] if len(stops) else new
    return found


def _make_search(
    engine: Engine, sampler: Any, stop_token_ids: tuple[int, ...]
) -> Callable:
    task = engine.task

    def next_step(prompt: Any, cache: Any, index: Any) -> Any:
        # The protocol feeds the token before `index` again, so the cache
        # holds the positions before that one.
        token = ops.slice(prompt, (0, index - 1), (ops.shape(prompt)[0], 1))
        mask = ops.ones_like(token, dtype="bool")
        # A search goes back to caches it had before: they are not given away.
        hidden, cache = engine.forward(cache, token, index - 1, mask, donate=False)
        return task.compute_logits(hidden)[:, 0], hidden[:, 0], cache

    def run(token_ids: Any, length: Any) -> Any:
        batch_size, width = token_ids.shape
        positions = ops.arange(width, dtype="int32")
        mask = ops.broadcast_to(positions[None, :] < length, (batch_size, width))
        before = ops.broadcast_to(positions[None, :] < length - 1, (batch_size, width))
        with NewCacheScope(batch_size, width, before) as scope:
            hidden = engine.hidden_states(token_ids, before)
        _, last, _ = next_step(token_ids, scope.cache, length)
        hidden = ops.slice_update(hidden, (0, length - 1, 0), last[:, None])
        return sampler(
            next=next_step,
            prompt=token_ids,
            cache=scope.cache,
            index=length,
            mask=mask,
            stop_token_ids=stop_token_ids or None,
            hidden_states=hidden,
            model=task,
        )

    return run


def _lockstep_groups(
    lengths: np.ndarray, limits: np.ndarray, stops: bool
) -> list[list[int]]:
    """Groups rows that a lockstep loop treats as it would each alone."""
    if stops:
        return [[row] for row in range(len(lengths))]
    groups: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(lengths.tolist(), limits.tolist())):
        groups.setdefault(key, []).append(row)
    return list(groups.values())
