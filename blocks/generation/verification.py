"""Speculative decoding: several guessed tokens are verified by one step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from keras import ops, tree

from attention import can_rewind
from attention.contract import Cache, Tensor, describe
from blocks.generation.compilation import StepKey
from blocks.generation.endings import Endings
from blocks.generation.engine import Engine, is_any
from blocks.generation.options import Options
from blocks.generation.prompts import pad_rows
from blocks.generation.running_batch import (
    Block,
    RunningBatch,
    check_chosen,
    completed_rows,
    on_host,
    pad_stops,
)
from blocks.generation.sampling import Memory, Sampling
from blocks.generation.speculation import Speculation


def speculate(
    batch: RunningBatch,
    speculation: Speculation,
    rows: list[np.ndarray],
    room: np.ndarray,
    endings: Endings,
    options: Options,
) -> Iterator[Block]:
    """Continues rows as `RunningBatch.decode`, with guesses."""
    if room.max() <= 0:
        return
    engine, guesses = batch.engine, speculation.num_tokens
    guesser = speculation.begin_with(len(rows), batch.sources)
    sampling = engine.sampling(options)
    stop_array = pad_stops(endings.stop_token_ids, batch.sizes)
    memory = sampling.begin(rows, batch.capacity)
    block, finished, memory = batch.sample(sampling, room, stop_array, memory)
    finished = finished | endings.reached(block.rows())
    finished = finished | completed_rows(sampling, block, endings)
    yield block
    rows = [np.append(*x).astype("int32") for x in zip(rows, block.tokens)]
    room = (room - 1).astype("int32")
    while not finished.all():
        asked = [row[: 0 if done else None] for row, done in zip(rows, finished)]
        proposed = speculation.propose(guesser, asked)
        if len(proposed) != len(rows):
            raise ValueError(
                f"`propose` must return an array of tokens for each of {len(rows)} rows. "
                f"It returned {describe(proposed)}"
            )
        proposed = [np.asarray(x, "int32").reshape(-1) for x in proposed]
        # A guess for the last place is of no use.
        most = np.where(finished, 0, np.clip(room - 1, 0, guesses))
        counts = np.minimum([len(x) for x in proposed], most).astype("int32")
        least = int(batch.processed.min())
        reached = int(np.where(finished, 0, batch.processed + 1 + counts).max())
        batch.reserve(reached)
        # A small cache may not take that many guesses at once.
        width = min(guesses + 1, batch.capacity, engine.max_positions or batch.capacity)
        counts = np.minimum(counts, width - 1)
        proposed = [x[:n] for x, n in zip(proposed, counts)]
        hosted, counts = sampling.look_ahead(proposed, width)
        given = [np.append(a[-1:], b[:n]) for a, b, n in zip(rows, proposed, counts)]
        tokens, _ = pad_rows(given, width)
        rewinds = can_rewind(engine.sites, batch.cache, reached, least)
        memory = sampling.grown(memory, batch.capacity)
        state = (tokens, counts, batch.processed, room, memory, hosted)
        with batch.forgetting_if_it_fails():
            batch.cache, memory, *found = engine.functions.run(
                StepKey("verify", len(rows), batch.capacity, width, variant=rewinds),
                functools.partial(_make_verify, engine, rewinds),
                (batch.cache, *state, finished, stop_array, sampling.settings),
                donate=(0,),
                sampling=sampling,
            )
            block = on_host(Block(*found))
            check_chosen(block, batch.processed + 1)
        new = block.rows()
        counts = np.array(list(map(len, new)), "int32")
        batch.processed = batch.processed + counts
        room = room - counts
        rows = [np.concatenate(pair) for pair in zip(rows, new)]
        last = np.array([row[-1] for row in rows], "int32")
        finished = finished | (room <= 0) | np.isin(last, stop_array)
        finished = finished | endings.reached(new)
        finished = finished | completed_rows(sampling, block, endings)
        yield block


def _make_verify(engine: Engine, rewinds: bool, sampling: Sampling) -> Callable:
    def verify(cache: Cache, *args: Any) -> tuple[Cache, Any, Tensor, Tensor, Any]:
        tokens, counts, index, room, memory, hosted, *others = args
        finished, stops, settings = others
        width = tokens.shape[1]
        places = ops.arange(width, dtype="int32")[None]
        active = ops.logical_not(finished)[:, None]
        mask = ops.logical_and(places <= counts[:, None], active)
        hidden, updated = engine.forward(cache, tokens, index, mask, donate=rewinds)
        logits = engine.task.compute_logits(hidden)  # (rows, width, vocabulary)
        sampled, logprobs, memories = _choose_all(
            sampling, logits, tokens, index, settings, memory, hosted
        )
        # A sampled token counts if all guesses before it were right, and no row
        # had ended.
        right = ops.logical_and(
            sampled[:, :-1] == tokens[:, 1:], places[:, :-1] < counts[:, None]
        )
        ended = is_any(sampled[:, :-1], stops)
        goes_on = ops.logical_and(right, ops.logical_not(ended))
        reached = ops.cumprod(ops.cast(goes_on, "int32"), axis=1)
        reached = ops.concatenate([ops.ones_like(reached[:, :1]), reached], axis=1)
        valid = ops.logical_and(ops.cast(reached, "bool"), places < room[:, None])
        valid = ops.logical_and(valid, active)
        if not rewinds:
            # The wrong tokens can't be taken back: process the right ones again, with
            # the cache from before.
            _, updated = engine.forward(cache, tokens, index, valid)
        if sampling.processors:
            # What they keep is that after the last token that counts.
            last = ops.maximum(ops.sum(ops.cast(valid, "int32"), axis=1) - 1, 0)
            memory = tree.map_structure(lambda *x: _of_place(x, last), *memories)
        return updated, memory, sampled, valid, logprobs

    return verify


def _choose_all(
    sampling: Sampling,
    logits: Tensor,
    tokens: Tensor,
    index: Tensor,
    settings: dict[str, Tensor],
    memory: Any,
    hosted: dict[str, Any],
) -> tuple[Tensor, Any, list[Any]]:
    """Chooses a token at each place, `(rows, width)`, as if all guesses were right.

    Returns:
        `(sampled, logprobs, memories)`: the memory after each place.
    """
    rows, width = tokens.shape
    if not sampling.processors:
        flat = ops.reshape(logits, (rows * width, logits.shape[-1]))
        lengths = index[:, None] + 1 + ops.arange(width, dtype="int32")[None]
        settings = {
            name: ops.repeat(x, width, axis=0) if len(x.shape) else x
            for name, x in settings.items()
        }
        token, logprobs, _ = sampling.choose(flat, ops.reshape(lengths, -1), settings)
        found = tree.map_structure(
            lambda x: ops.reshape(x, (rows, width, *x.shape[1:])), (token, logprobs)
        )
        return *found, []
    steps, memories = [], []
    for place in range(width):
        if place:
            # The token chosen before is replaced by the guess: they differ only where
            # this place does not count.
            here = ops.arange(memory.token_ids.shape[1], dtype="int32")[None]
            here = here == index[:, None] + place
            token_ids = ops.where(here, tokens[:, place, None], memory.token_ids)
            memory = Memory(token_ids, *memory[1:])
        states = tree.map_structure(lambda x: x[place], hosted)  # noqa: B023
        memory = sampling.with_hosted(memory, states)
        # Places behind the end of a row do not count.
        lengths = ops.minimum(index + 1 + place, memory.token_ids.shape[1])
        *step, memory = sampling.choose(logits[:, place], lengths, settings, memory)
        steps.append(step)
        memories.append(memory)
    sampled, logprobs = tree.map_structure(lambda *x: ops.stack(x, axis=1), *steps)
    return sampled, logprobs, memories


def _of_place(values: tuple[Tensor, ...], place: Tensor) -> Tensor:
    """Returns for each row one of several tensors, `(rows, ...)`."""
    found = values[0]
    for number, value in enumerate(values[1:], 1):
        here = ops.reshape(place == number, (-1, *[1] * (len(value.shape) - 1)))
        found = ops.where(here, value, found)
    return found
