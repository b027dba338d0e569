"""The rows of a running batch that requests join and leave."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import numpy as np
from keras import ops, tree

from attention.contract import Cache, Tensor
from blocks.generation.compilation import StepKey
from blocks.generation.engine import Engine
from blocks.generation.options import Options
from blocks.generation.processors import HostProcessor
from blocks.generation.running_batch import (
    Block,
    block_of_one,
    on_host,
    pad_stops,
)
from blocks.serving.job import Job


class Slots:
    """The KV cache of a running batch, and what else each of its rows has.

    Args:
        engine: compiles the steps.
        rows: int. How many there are.
        max_length: int. The capacity of the cache.
        options: an `Options` of so many rows, in the form that all requests have.
    """

    def __init__(
        self, engine: Engine, rows: int, max_length: int, options: Options
    ) -> None:
        self.engine, self.rows, self.max_length = engine, rows, max_length
        self.num_stops = engine.sizes.few_stops
        self._sampling = engine.sampling(options)
        self._cache = engine.create_cache(rows, max_length)
        nothing = [np.zeros((1,), "int32")] * rows
        self._memory = self._sampling.begin(nothing, max_length)
        # On the host: of each row its last token, how many tokens the cache holds, how
        # many more it may get, whether it gets none, and its stop tokens.
        self._token, self._index, self._room = np.zeros((3, rows), "int32")
        self.finished = np.ones((rows,), "bool")
        self._stops = np.full((rows, self.num_stops), -1, "int32")
        # What makes masks while the device computes.
        self._host = concurrent.futures.ThreadPoolExecutor(1)
        self._any_token = self._sampling.next_states()

    def process(
        self, cache: Cache | None, tokens: np.ndarray, start: int, end: int
    ) -> tuple[Tensor, Cache]:
        """Processes tokens `start` to `end` of a prompt, whose cache has one row.

        Returns:
            The logits after the last of them, `(1, vocabulary_size)`, and the cache.
        """
        part, length = tokens[None, start:end], np.array([end - start], "int32")
        # The same steps process the first tokens and further ones.
        cache = cache or self.engine.create_cache(1, self.max_length)
        return self.engine.process(
            cache, self.max_length, part, np.int32(start), length
        )

    def join(self, row: int, job: Job, logits: Tensor) -> Block:
        """Makes a prompt that was processed a row; returns the block of its first token.

        `logits` are those after the prompt.
        """
        cache, job.prefill.cache = job.prefill.cache, None
        length, stops = len(job.tokens), job.endings.stop_token_ids
        found, logprobs, memory = self.engine.sample(
            logits, job.sampling, np.array([length], "int32"), job.memory
        )
        self._cache, self._memory = self.engine.functions.run(
            StepKey("insert", self.rows, self.max_length),
            lambda _: _put_row,
            ((self._cache, self._memory), (cache, memory), np.int32(row)),
            donate=(0,),
        )
        block = block_of_one(found, np.ones((1,), "bool"), logprobs)
        padded = pad_stops(stops, self.engine.sizes)
        # New arrays: a step may still read the old ones.
        self._sampling.settings = {
            name: _replaced(x, row, job.sampling.settings[name][0])
            for name, x in self._sampling.settings.items()
        }
        self._stops = _replaced(self._stops, row, padded)
        self._token = _replaced(self._token, row, max(int(block.tokens[0, 0]), 0))
        self._index = _replaced(self._index, row, length)
        self._room = _replaced(self._room, row, job.room - 1)
        self.finished = _replaced(self.finished, row, False)
        return block

    def leave(self, row: int) -> None:
        """Makes a row free."""
        self.finished = _replaced(self.finished, row, True)

    def decode(
        self, steps: int, grammars: dict[int, HostProcessor]
    ) -> tuple[Block, dict[int, Exception]]:
        """Gives each row that is not free up to so many tokens.

        `grammars` are those of the rows that have one. Then each row gets a single token,
        and the masks are made while the device computes the logits.

        Returns:
            The block, and the errors of rows whose grammar failed: their token is wrong.
        """
        self._memory = self._sampling.with_hosted(self._memory, self._any_token)
        if grammars:
            return self._decode_with(grammars)
        left = np.where(self.finished, 0, self._room)
        steps = max(1, min(steps, int(left.max()), self.engine.sizes.block_steps))
        state: Any = (
            self._token,
            self._index,
            self._room,
            self._memory,
            self.finished,
        )
        self._cache, *state, tokens, valid, logprobs = self.engine.decode(
            self._cache,
            self.max_length,
            self._sampling,
            *state,
            np.int32(steps),
            self._stops,
        )
        token, index, room, self._memory, finished = state
        self._token, self._index, self._room, self.finished = (
            np.array(ops.convert_to_numpy(x)) for x in (token, index, room, finished)
        )
        return on_host(Block(tokens, valid, logprobs), steps), {}

    def _decode_with(
        self, grammars: dict[int, HostProcessor]
    ) -> tuple[Block, dict[int, Exception]]:
        active = np.logical_not(self.finished)
        making = self._host.submit(self._masks, grammars)
        # A free row has no place for a token.
        limits = np.where(active, np.int32(self.max_length), 0).astype("int32")
        logits, self._cache = self.engine.step(
            self._cache, self.max_length, self._token, self._index, limits, True
        )
        self._index = self._index + active.astype("int32")
        masks, failed = making.result()
        memory = self._sampling.with_hosted(self._memory, masks)
        found, logprobs, self._memory = self.engine.sample(
            logits, self._sampling, self._index, memory
        )
        block = block_of_one(found, active, logprobs)
        chosen = block.tokens[:, 0]
        at_stop = (chosen[:, None] == self._stops).any(axis=1)
        ended = (self._room <= 1) | at_stop | (chosen < 0)
        self.finished = self.finished | ended
        self._room = self._room - active.astype("int32")
        self._token = np.maximum(chosen, 0)
        return block, failed

    def _masks(
        self, grammars: dict[int, HostProcessor]
    ) -> tuple[dict[str, Any], dict[int, Exception]]:
        """Returns the states of rows with a grammar and without, and errors by row."""
        states = tree.map_structure(np.copy, self._any_token)
        failed: dict[int, Exception] = {}
        for row, grammar in grammars.items():
            try:
                own = grammar.next_state()
            except Exception as error:
                failed[row] = error
                continue
            for state in states.values():
                state[row] = own[0]
        return states, failed


def _replaced(array: np.ndarray, row: int, value: Any) -> np.ndarray:
    """Returns a copy of an array with another value for a row."""
    array = array.copy()
    array[row] = value
    return array


def _put_row(batch: Any, one: Any, row: Tensor) -> Any:
    """Returns tensors of a batch, with those of one row in its place."""

    def put(tensor: Tensor, value: Tensor) -> Tensor:
        start = (row, *[0] * (len(tensor.shape) - 1))
        return ops.slice_update(tensor, start, ops.cast(value, tensor.dtype))

    return tree.map_structure(put, batch, one)
