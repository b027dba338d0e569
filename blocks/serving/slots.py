"""The rows of a running batch that requests join and leave."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops, tree

from attention.contract import Cache, Tensor
from blocks.generation.compilation import StepKey
from blocks.generation.engine import Engine
from blocks.generation.grammar import ANY_TOKEN
from blocks.generation.options import Options
from blocks.generation.processors import HostProcessor
from blocks.generation.running_batch import (
    Block,
    block_of_one,
    on_host,
    pad_stops,
)
from blocks.generation.sampling import Memory, Sampling


class Slots:
    """The KV cache of a running batch, and what else each of its rows has.

    Args:
        engine: compiles the steps.
        sampler: the sampler that the model was compiled with.
        rows: int. How many there are.
        max_length: int. The capacity of the cache.
        options: an `Options` of so many rows, in the form that all requests have.
    """

    def __init__(
        self, engine: Engine, sampler: Any, rows: int, max_length: int, options: Options
    ) -> None:
        self.engine, self.rows, self.max_length = engine, rows, max_length
        self.num_stops = engine.sizes.few_stops
        self._sampler = sampler
        self._sampling = Sampling(sampler, engine.task, options)
        self._cache = engine.create_cache(rows, max_length)
        nothing = [np.zeros((1,), "int32")] * rows
        self._memory = self._sampling.begin(nothing, max_length)
        # On the host: of each row its last token, how many tokens the cache holds, how
        # many more it may get, whether it gets none, and its stop tokens.
        self._token, self._index, self._room = np.zeros((3, rows), "int32")
        self.finished = np.ones((rows,), "bool")
        self._stops = np.full((rows, self.num_stops), -1, "int32")

    def process(
        self, cache: Cache | None, tokens: np.ndarray, start: int, end: int
    ) -> tuple[Tensor, Cache]:
        """Processes tokens `start` to `end` of a prompt, whose cache has one row.

        Returns:
            The logits after the last of them, `(1, vocabulary_size)`, and the cache.
        """
        part, length = tokens[None, start:end], np.array([end - start], "int32")
        return self.engine.process(
            cache, self.max_length, part, np.int32(start), length
        )

    def join(
        self,
        row: int,
        tokens: np.ndarray,
        logits: Tensor,
        cache: Cache,
        room: int,
        options: Options,
        stops: tuple[int, ...],
    ) -> Block:
        """Makes a prompt that was processed a row; returns the block of its first token."""
        sampling = Sampling(self._sampler, self.engine.task, options)
        memory = sampling.begin([tokens], self.max_length)
        length = np.array([len(tokens)], "int32")
        found, logprobs, memory = self.engine.sample(logits, sampling, length, memory)
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
            name: _replaced(x, row, options.numbers[name][0])
            for name, x in self._sampling.settings.items()
        }
        self._stops = _replaced(self._stops, row, padded)
        self._token = _replaced(self._token, row, max(int(block.tokens[0, 0]), 0))
        self._index = _replaced(self._index, row, len(tokens))
        self._room = _replaced(self._room, row, room - 1)
        self.finished = _replaced(self.finished, row, False)
        return block

    def leave(self, row: int) -> None:
        """Makes a row free."""
        self.finished = _replaced(self.finished, row, True)

    def decode(self, steps: int, hosts: list[HostProcessor | None]) -> Block:
        """Gives each row that is not free up to so many tokens.

        `hosts` are the grammars of the rows that have one, which have taken all tokens;
        with one of them, a row gets a single token.
        """
        if self._sampling.hosted:
            self._memory = self._with_states(hosts)
            steps = steps if not any(hosts) else 1
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
        return on_host(Block(tokens, valid, logprobs), steps)

    def _with_states(self, hosts: list[HostProcessor | None]) -> Memory:
        """Returns the memory with the states of these, for the next token."""
        *states, mask = self._memory.states
        found = np.full(mask.shape, ANY_TOKEN, "int32")
        for row, host in enumerate(hosts):
            if host is not None:
                found[row] = host.next_state()[0]
        token_ids, prompt_lengths, _ = self._memory
        return Memory(token_ids, prompt_lengths, (*states, found))


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
