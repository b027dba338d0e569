"""Token generation: prefill once, then compiled blocks of decode steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from attention import CacheScope, NewCacheScope, grow_cache
from blocks.backbone_inputs import backbone_inputs
from blocks.compilation import CompiledFunctions

# Decode steps per compiled call. Between two calls the host sees the new
# tokens, stops if all rows are done, and grows the cache if it is full.
BLOCK_STEPS = 32
# Prompts are padded, and caches sized, to few lengths, as each is compiled.
MIN_PROMPT_LENGTH = 16
MIN_CAPACITY = 128


def round_up(length: int, smallest: int) -> int:
    """The smallest power of two times `smallest` that is at least `length`."""
    while smallest < length:
        smallest *= 2
    return smallest


class Generator:
    """Generates tokens with a causal language model.

    It knows nothing of attention: it opens cache scopes around the backbone.
    Rows stand at positions of their own, so prompts of different lengths give
    what each gives alone.

    Args:
        task: a `blocks.CausalLM`.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self._compiled = CompiledFunctions(task)

    def generate(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        limits: np.ndarray,
        stop_token_ids: tuple[int, ...],
    ) -> list[np.ndarray]:
        """Continues each row until its limit or its first stop token.

        Args:
            token_ids: `int32` array of shape `(batch, width)`: the prompts.
            lengths: `int32` array `(batch,)`: the lengths of the prompts.
            limits: `int32` array `(batch,)`: the lengths at which rows end.
            stop_token_ids: the tokens at which a row ends; they are part of it.

        Returns:
            The new tokens of each row.
        """
        sampler = self._task.sampler
        new_tokens: list[list[np.ndarray]] = [[] for _ in lengths]
        if type(sampler).__call__ is keras_hub.samplers.Sampler.__call__:
            blocks = self._decode(token_ids, lengths, limits, stop_token_ids)
            for tokens, valid in blocks:
                for row, collected in enumerate(new_tokens):
                    collected.append(tokens[row][valid[row]])
        else:
            # A sampler with a loop of its own moves all rows in lockstep, and
            # goes on until all have stopped. Rows that would disturb each other
            # are given to it one by one.
            for rows in _lockstep_groups(lengths, limits, bool(stop_token_ids)):
                found = self._search(
                    token_ids[rows], lengths[rows[0]], limits[rows[0]], stop_token_ids
                )
                for row, tokens in zip(rows, found):
                    new_tokens[row].append(tokens)
        empty = np.zeros((0,), "int32")
        return [np.concatenate([empty, *collected]) for collected in new_tokens]

    def _decode(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        limits: np.ndarray,
        stop_token_ids: tuple[int, ...],
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields blocks of new tokens, and which of them are part of the rows."""
        room = (limits - lengths).astype("int32")
        if room.max() <= 0:
            return
        longest, total = int(lengths.max()), int(limits.max())
        # A row that is shorter than the others may have further to go than they.
        most_steps = int(room.max()) - 1
        width = round_up(longest, MIN_PROMPT_LENGTH)
        prompts = np.zeros((len(lengths), width), "int32")
        prompts[:, :longest] = token_ids[:, :longest]
        # -1 is no token: it stands for "none".
        stops = np.array(stop_token_ids or (-1,), "int32")

        # The last token is never absorbed.
        needed = min(longest + min(BLOCK_STEPS, most_steps), total - 1)
        capacity = round_up(max(width, needed), MIN_CAPACITY)
        prefill = self._compiled.get(
            ("prefill", capacity), lambda: self._make_prefill(capacity)
        )
        token, finished, cache = prefill(prompts, lengths, room, stops)
        yield _to_numpy(token)[:, None], (room > 0)[:, None]
        room = room - 1
        # One index for all rows is the faster way to write to a cache.
        index: Any = lengths.astype("int32")
        if (lengths == longest).all():
            index = np.int32(longest)
        decode = self._compiled.get("decode", self._make_decode, donate=(0,))
        # No row stands beyond this position.
        reached = longest
        while not _to_numpy(finished).all():
            steps = min(BLOCK_STEPS, most_steps)
            reached = min(reached + steps, total - 1)
            if reached > capacity:
                capacity = round_up(reached, MIN_CAPACITY)
                cache = grow_cache(self._sites, cache, capacity)
            cache, token, index, room, finished, tokens, valid = decode(
                cache, token, index, room, finished, np.int32(steps), stops
            )
            most_steps -= steps
            yield _to_numpy(tokens), _to_numpy(valid)

    def _make_prefill(self, capacity: int) -> Any:
        task, sampler = self._task, self._task.sampler

        def prefill(token_ids: Any, lengths: Any, room: Any, stops: Any) -> Any:
            positions = ops.arange(ops.shape(token_ids)[1], dtype="int32")
            mask = positions[None, :] < lengths[:, None]
            batch_size = token_ids.shape[0]
            with NewCacheScope(batch_size, capacity, mask) as scope:
                hidden = self._hidden_states(token_ids, mask)
            self._sites = tuple(scope.layers)
            # Only the last token's hidden state goes to the vocabulary.
            last = ops.reshape(lengths - 1, (-1, 1, 1))
            logits = task.compute_logits(ops.take_along_axis(hidden, last, axis=1))
            token = _sample(sampler, logits[:, 0])
            finished = ops.logical_or(room <= 1, _is_any(token, stops))
            return token, finished, scope.cache

        return prefill

    def _make_decode(self) -> Any:
        task, sampler = self._task, self._task.sampler

        def decode(
            cache: Any,
            token: Any,
            index: Any,
            room: Any,
            finished: Any,
            steps: Any,
            stops: Any,
        ) -> Any:
            batch_size = token.shape[0]
            shape = (batch_size, BLOCK_STEPS)

            def condition(step: Any, *state: Any) -> Any:
                unfinished = ops.logical_not(ops.all(state[4]))
                return ops.logical_and(step < steps, unfinished)

            def body(
                step: Any,
                cache: Any,
                token: Any,
                index: Any,
                room: Any,
                finished: Any,
                tokens: Any,
                valid: Any,
            ) -> Any:
                active = ops.logical_not(finished)
                with CacheScope(cache, index, active[:, None]) as scope:
                    hidden = self._hidden_states(token[:, None], active[:, None])
                token = _sample(sampler, task.compute_logits(hidden)[:, 0])
                rows_differ = len(index.shape) == 1
                index = index + (ops.cast(active, "int32") if rows_differ else 1)
                tokens = ops.slice_update(tokens, (0, step), token[:, None])
                valid = ops.slice_update(valid, (0, step), active[:, None])
                done = ops.logical_or(room <= 1, _is_any(token, stops))
                finished = ops.logical_or(finished, done)
                return (
                    step + 1,
                    scope.cache,
                    token,
                    index,
                    room - 1,
                    finished,
                    tokens,
                    valid,
                )

            _, *state = sampler.run_loop(
                condition,
                body,
                model=task,
                loop_vars=(
                    ops.zeros((), dtype="int32"),
                    cache,
                    token,
                    index,
                    room,
                    finished,
                    ops.zeros(shape, dtype="int32"),
                    ops.zeros(shape, dtype="bool"),
                ),
            )
            return tuple(state)

        return decode

    def _search(
        self,
        token_ids: np.ndarray,
        length: int,
        limit: int,
        stop_token_ids: tuple[int, ...],
    ) -> list[np.ndarray]:
        """Runs a sampler that has a loop of its own over prompts of one length."""
        if limit <= length:
            return [token_ids[0, :0]] * len(token_ids)
        buffer = np.zeros((len(token_ids), limit), "int32")
        buffer[:, :length] = token_ids[:, :length]
        search = self._compiled.get(
            ("search", stop_token_ids), lambda: self._make_search(stop_token_ids)
        )
        found = _to_numpy(search(buffer, np.int32(length)))[:, length:]
        ends = []
        for row in found:
            stops = np.flatnonzero(np.isin(row, stop_token_ids))
            ends.append(stops[0] + 1 if len(stops) else len(row))
        return [row[:end] for row, end in zip(found, ends)]

    def _make_search(self, stop_token_ids: tuple[int, ...]) -> Any:
        task, sampler = self._task, self._task.sampler

        def next_step(prompt: Any, cache: Any, index: Any) -> Any:
            # The protocol feeds the token before `index` again, so the cache
            # holds the positions before that one.
            token = ops.slice(prompt, (0, index - 1), (ops.shape(prompt)[0], 1))
            with CacheScope(cache, index - 1) as scope:
                hidden = self._hidden_states(token, ops.ones_like(token))
            logits = task.compute_logits(hidden)
            return logits[:, 0], hidden[:, 0], scope.cache

        def search(token_ids: Any, length: Any) -> Any:
            batch_size, width = token_ids.shape
            positions = ops.arange(width, dtype="int32")
            mask = ops.broadcast_to(positions[None, :] < length, (batch_size, width))
            before = ops.broadcast_to(
                positions[None, :] < length - 1, (batch_size, width)
            )
            with NewCacheScope(batch_size, width, before) as scope:
                hidden = self._hidden_states(token_ids, before)
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

        return search

    def _hidden_states(self, token_ids: Any, padding_mask: Any) -> Any:
        backbone = self._task.backbone
        padding_mask = ops.cast(padding_mask, "int32")
        return backbone(backbone_inputs(backbone, token_ids, padding_mask))


def _sample(sampler: Any, logits: Any) -> Any:
    token = sampler.get_next_token(sampler.compute_probabilities(logits))
    return ops.cast(token, "int32")


def _is_any(token: Any, stops: Any) -> Any:
    return ops.any(token[:, None] == stops[None, :], axis=-1)


def _to_numpy(x: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(x)


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
