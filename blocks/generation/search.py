"""Samplers that search by themselves, with KerasHub's own protocol."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from attention.contract import Cache, Index, Tensor
from blocks.generation.compilation import StepKey
from blocks.generation.engine import Engine
from blocks.generation.prompts import NO_TOKENS, Prompts
from blocks.generation.running_batch import BROKEN_LOGITS
from blocks.generation.sampling import Sampling
from blocks.generation.sources import encode, with_tokens


def search(
    engine: Engine, prompts: Prompts, stop_token_ids: tuple[int, ...]
) -> list[np.ndarray]:
    """Returns the new tokens of each row, by a sampler that has a loop of its own.

    The sampler moves all rows in lockstep until all have stopped. Rows whose outputs
    this would change are given to it one by one.
    """
    sampling = engine.sampling()
    lengths, limits = prompts.lengths, prompts.limits
    found: list[np.ndarray] = [NO_TOKENS] * len(lengths)
    groups: dict[tuple, list[int]] = {}
    for row, lasts in enumerate(zip(lengths.tolist(), limits.tolist())):
        groups.setdefault((*lasts, row if stop_token_ids else None), []).append(row)
    for (length, limit, _), rows in groups.items():
        if limit <= length:
            continue
        buffer = np.zeros((len(rows), limit), "int32")
        buffer[:, :length] = prompts.token_ids[rows, :length]
        sources = {name: x[rows] for name, x in (prompts.sources or {}).items()}
        cache = encode(engine, sources, limit)
        given = with_tokens(buffer, sources, engine)
        if isinstance(given, dict) and given["embedding_mask"][:, length - 1].any():
            raise ValueError(
                f"A search reads the last token of a prompt again, so it can't be an "
                f"embedding. Received: a prompt of {length} positions"
            )
        tokens, broken = engine.functions.run(
            StepKey("search", len(rows), limit, variant=stop_token_ids),
            lambda sampling: _make_search(engine, sampling, stop_token_ids),
            (given, np.int32(length), () if cache is None else cache),
            sampling=sampling,
        )
        broken = ops.convert_to_numpy(broken)
        if broken.any():
            row = rows[int(broken.argmax())]
            raise ValueError(
                "The model's logits became NaN or infinite in a search that continues "
                f"row {row}, a prompt of {lengths[row]} tokens. {BROKEN_LOGITS}"
            )
        tokens = ops.convert_to_numpy(tokens)[:, length:]
        for row, new in zip(rows, tokens):
            stops = np.flatnonzero(np.isin(new, stop_token_ids))
            found[row] = new[: stops[0] + 1] if len(stops) else new
    return found


class _SearchCache(NamedTuple):
    """The cache that a search passes from step to step, row by row."""

    cache: list[Tensor]
    broken: Tensor  # (batch,): 1 where logits were NaN or infinite


class _SourceParts:
    """The parts of a cache that hold sources: all candidates of a row have the same.

    So a search neither moves nor copies them.
    """

    def __init__(self, engine: Engine, cache: Cache) -> None:
        shapes = [
            [x.shape for x in tree.flatten(engine.create_cache(1, 1, length))]
            for length in (1, 2)
        ]
        self._cache = cache
        self._is_source = [a != b for a, b in zip(*shapes)]

    def without(self, cache: Cache) -> list[Tensor]:
        """Returns the other parts of a cache."""
        parts = zip(tree.flatten(cache), self._is_source)
        return [x for x, is_source in parts if not is_source]

    def joined(self, others: list[Tensor], times: int) -> Cache:
        """Returns a cache with `times` rows for each row of the sources."""
        left = iter(others)
        parts = zip(tree.flatten(self._cache), self._is_source)
        flat = [
            _repeat(x, times) if is_source else next(left) for x, is_source in parts
        ]
        return tree.pack_sequence_as(self._cache, flat)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else ops.repeat(x, times, axis=0)


def _make_search(
    engine: Engine, sampling: Sampling, stop_token_ids: tuple[int, ...]
) -> Callable:
    task = engine.task

    def next_step(
        prompt: Tensor,
        cache: _SearchCache,
        index: Index,
        parts: _SourceParts,
        rows: int,
    ) -> tuple:
        # The protocol feeds the token before `index` again, so the cache holds the
        # positions before that token.
        token = ops.slice(prompt, (0, index - 1), (ops.shape(prompt)[0], 1))
        mask = ops.ones_like(token, dtype="bool")
        # A search goes back to earlier caches, so they are not donated.
        whole = parts.joined(cache.cache, token.shape[0] // rows)
        hidden, new = engine.forward(whole, token, index - 1, mask, donate=False)
        logits = task.compute_logits(hidden)[:, 0]
        total = ops.logsumexp(ops.cast(logits, "float32"), axis=-1)
        broken = ops.cast(ops.logical_not(ops.isfinite(total)), "int32")
        new = _SearchCache(parts.without(new), ops.maximum(cache.broken, broken))
        return sampling.mask_unknown(logits), hidden[:, 0], new

    def run(tokens: Any, length: Tensor, given: Cache) -> tuple[Tensor, Tensor]:
        token_ids = tokens["token_ids"] if isinstance(tokens, dict) else tokens
        batch_size, width = token_ids.shape
        positions = ops.arange(width, dtype="int32")[None]
        mask = ops.broadcast_to(positions < length, (batch_size, width))
        before = ops.broadcast_to(positions < length - 1, (batch_size, width))
        empty = given or engine.create_cache(batch_size, width)
        hidden, filled = engine.forward(empty, tokens, 0, before, donate=False)
        parts = _SourceParts(engine, filled)
        broken = ops.zeros((batch_size,), dtype="int32")
        cache = _SearchCache(parts.without(filled), broken)
        step = functools.partial(next_step, parts=parts, rows=batch_size)
        _, last, first = step(token_ids, cache, length)
        hidden = ops.slice_update(hidden, (0, length - 1, 0), last[:, None])
        ends: list[_SearchCache] = []
        watched: Any = copy.copy(sampling.sampler)

        def run_loop(*args: Any, **kwargs: Any) -> Any:
            state = sampling.sampler.run_loop(*args, **kwargs)
            ends.extend(x for x in state if isinstance(x, _SearchCache))
            return state

        watched.run_loop = run_loop
        tokens = watched(
            next=step,
            prompt=token_ids,
            cache=cache,
            index=length,
            mask=mask,
            stop_token_ids=stop_token_ids or None,
            hidden_states=hidden,
            model=task,
        )
        broken = first.broken
        for end in ends:
            # A search may have several candidates for each row.
            candidates = ops.reshape(end.broken, (batch_size, -1))
            broken = ops.maximum(broken, ops.max(candidates, axis=1))
        return tokens, broken

    return run
