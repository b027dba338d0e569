"""The part of generation that runs on the host: rows continued together."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from attention import grow_cache
from attention.contract import Cache, Index, Tensor
from blocks.generation.compilation import GenerationSizes
from blocks.generation.endings import Endings
from blocks.generation.engine import Engine
from blocks.generation.options import NO_OPTIONS, Options
from blocks.generation.prompts import pad_rows
from blocks.generation.sampling import Sampling
from blocks.generation.sources import Sources, encode, with_tokens


class Block(NamedTuple):
    """New tokens of the rows of a batch.

    Attributes:
        tokens: `int32` array `(batch, steps)`.
        valid: bool array `(batch, steps)`: which of them are part of the rows.
        logprobs: `Logprobs` of arrays, or `()` if they were not asked for.
    """

    tokens: np.ndarray
    valid: np.ndarray
    logprobs: Any = ()

    def rows(self) -> list[np.ndarray]:
        """Returns the new tokens of each row."""
        return [row[mask] for row, mask in zip(self.tokens, self.valid)]


BROKEN_LOGITS = (
    "Look for NaN in `lm.get_weights()` (a `fit` whose loss became NaN, a damaged file); "
    "else for a layer that divides by zero or overflows in float16, or for a very small "
    "`temperature`, or a logits processor that leaves no token."
)


class RunningBatch:
    """Rows of tokens that are continued together, each at its own position.

    Args:
        engine: compiles the steps.
        batch_size: int. The number of rows.
        sources: what an encoder reads, or what is beside the tokens of prompts, by name,
            with a row for each; or `None`.

    Attributes:
        cache: the KV cache, or `None` before anything was processed.
        capacity: int. The size of the cache.
        processed: `int32` array `(batch,)`: how many positions of each row the
            cache holds.
        logits: the logits after the last prompt of each row; outdated for a row that
            has been continued since.
    """

    def __init__(
        self, engine: Engine, batch_size: int, sources: Sources | None = None
    ) -> None:
        self.engine, self.sources = engine, sources
        self.sizes = engine.sizes
        self.batch_size = batch_size
        self.cache: Cache = None
        self.capacity = 0
        self.processed = np.zeros((batch_size,), "int32")
        self.logits: Tensor = None

    def process(self, rows: list[np.ndarray], room: int = 0) -> int:
        """Processes the tokens that the cache does not hold yet, and returns their number.

        `rows` are all tokens of each row, and `room` how many more positions to reserve.
        """
        tokens, lengths = pad_rows([x[n:] for x, n in zip(rows, self.processed)])
        if not lengths.any():
            return 0
        ahead = min(room, self.sizes.block_steps)
        self.reserve(int((self.processed + lengths).max()) + ahead)
        if self.cache is None:
            self.cache = encode(self.engine, self.sources, self.capacity)
        groups = [np.arange(self.batch_size)]
        if self.cache is None:
            groups = self._groups(lengths)
        given = with_tokens(tokens, self.sources, self.engine, self.processed)
        old = self.logits
        with self.forgetting_if_it_fails():
            parts = [self._process_rows(group, given, lengths) for group in groups]
        self.logits, self.cache = parts[0]
        if len(parts) > 1:
            order = np.argsort(np.concatenate(groups)).astype("int32")
            self.logits, self.cache = tree.map_structure(
                lambda *x: ops.take(ops.concatenate(x, axis=0), order, axis=0), *parts
            )
        if old is not None:
            self.logits = ops.where((lengths > 0)[:, None], self.logits, old)
        self.processed = self.processed + lengths
        return int(lengths.sum())

    def _process_rows(
        self, rows: np.ndarray, tokens: Any, lengths: np.ndarray
    ) -> tuple[Tensor, Cache]:
        capacity = self._capacity_of(rows, lengths)
        logits, cache = self.engine.process(
            self.cache,
            capacity,
            tree.map_structure(lambda x: x[rows], tokens),
            self._index(),
            lengths[rows],
        )
        if capacity < self.capacity:
            cache = grow_cache(self.engine.sites, cache, self.capacity)
        return logits, cache

    def _capacity_of(self, rows: np.ndarray, lengths: np.ndarray) -> int:
        """Returns the capacity for some rows: a smaller cache has shorter chunks."""
        if len(rows) == self.batch_size:
            return self.capacity
        longest = int(lengths[rows].max())
        return min(self.sizes.round_up_capacity(longest), self.capacity)

    def _groups(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Splits rows into short and long ones if that saves much padding."""

        def cost(groups: list[np.ndarray]) -> int:
            total = 0
            for rows in groups:
                capacity = self._capacity_of(rows, lengths)
                chunk = self.sizes.chunk_length(len(rows), capacity)
                total += len(rows) * -(-int(lengths[rows].max()) // chunk) * chunk
            return total

        whole = [np.arange(len(lengths))]
        order = np.argsort(lengths, kind="stable")
        splits = ([order[:i], order[i:]] for i in range(1, len(order)))
        best = min(splits, key=cost, default=whole)
        saved = cost(whole) - cost(best)
        enough = max(cost(whole) / 2, self.sizes.min_tokens_saved)
        return best if saved >= enough else whole

    @contextlib.contextmanager
    def forgetting_if_it_fails(self) -> Iterator[None]:
        """Drops the cache if the step within fails, as its memory may be reused.

        The rows are then processed again before they are continued.
        """
        try:
            yield
        except BaseException:
            self.cache = self.logits = None
            self.processed = np.zeros_like(self.processed)
            raise

    def reserve(self, positions: int) -> None:
        """Grows the cache, if needed, to hold so many positions."""
        if positions <= self.capacity:
            return
        self.capacity = self.sizes.round_up_capacity(positions)
        if self.cache is not None:
            self.cache = grow_cache(self.engine.sites, self.cache, self.capacity)

    def repeat(self, times: int) -> None:
        """Makes each row `times` rows, one after the other."""
        rows = np.repeat(np.arange(self.batch_size, dtype="int32"), times)
        self.logits, self.cache = tree.map_structure(
            lambda x: ops.take(x, rows, axis=0), (self.logits, self.cache)
        )
        self.processed = self.processed[rows]
        self.sources = self.sources and {k: x[rows] for k, x in self.sources.items()}
        self.batch_size *= times

    def copy(self) -> RunningBatch:
        """Returns a batch in the same state, which does not affect this one."""
        other = RunningBatch(self.engine, self.batch_size, self.sources)
        if self.cache is not None:
            # One may be donated and the other still be used.
            other.cache = tree.map_structure(ops.copy, self.cache)
        other.capacity, other.processed = self.capacity, self.processed.copy()
        other.logits = self.logits
        return other

    def sample(
        self, sampling: Sampling, room: np.ndarray, stops: np.ndarray, memory: Any
    ) -> tuple[Block, np.ndarray, Any]:
        """Chooses the next token of each row, after its prompt.

        Returns:
            The block of one token; which rows end with it, `(batch,)`; and the memory. A
            row ends if it has room for no other token.
        """
        found, logprobs, memory = self.engine.sample(
            self.logits, sampling, self.processed, memory
        )
        block = block_of_one(found, room > 0, logprobs)
        check_chosen(block, self.processed)
        at_stop = np.isin(block.tokens[:, 0], stops)
        return block, (room <= 1) | at_stop, memory

    def decode(
        self,
        rows: list[np.ndarray],
        room: np.ndarray,
        endings: Endings,
        options: Options = NO_OPTIONS,
        block_steps: int | None = None,
    ) -> Iterator[Block]:
        """Continues rows until each has reached its limit or its end.

        The last token of each row is not processed; a stop token is part of its row.
        Blocks of new tokens are yielded after each compiled call of `block_steps`.

        Args:
            rows: all tokens of each row, which the batch has processed.
            room: `int32` array `(batch,)`: how many tokens each row may get.
            endings: at what rows end.
            options: how tokens are chosen.
            block_steps: int or `None`, which means as many as there are.
        """
        if room.max() <= 0:
            return
        sampling = self.engine.sampling(options)
        stop_array = pad_stops(endings.stop_token_ids, self.sizes)
        memory = sampling.begin(rows, self.capacity)
        first, finished, memory = self.sample(sampling, room, stop_array, memory)
        finished = finished | endings.reached(first.rows())
        yield first
        if sampling.hosted:
            yield from self._decode_with_host(
                sampling, room, endings, first, finished, memory
            )
            return
        token: Tensor = first.tokens[:, 0]
        room = (room - 1).astype("int32")
        index: Index = self._index()
        block = min(block_steps or self.sizes.block_steps, self.sizes.block_steps)
        device_room: Tensor = room
        while not finished.all():
            left = np.where(finished, 0, room)
            steps = min(block, int(left.max()))
            self.reserve(int((self.processed + np.minimum(left, steps)).max()))
            memory = sampling.grown(memory, self.capacity)
            with self.forgetting_if_it_fails():
                state: Any = (token, index, device_room, memory, finished)
                self.cache, *state, tokens, valid, logprobs = self.engine.decode(
                    self.cache,
                    self.capacity,
                    sampling,
                    *state,
                    np.int32(steps),
                    stop_array,
                )
                token, index, device_room, memory, finished = state
                new = on_host(Block(tokens, valid, logprobs), steps)
                check_chosen(new, self.processed + 1)
            room = room - np.int32(steps)
            self.processed = self.processed + new.valid.sum(axis=1, dtype="int32")
            finished = ops.convert_to_numpy(finished) | endings.reached(new.rows())
            yield new

    def _decode_with_host(
        self,
        sampling: Sampling,
        room: np.ndarray,
        endings: Endings,
        block: Block,
        finished: np.ndarray,
        memory: Any,
    ) -> Iterator[Block]:
        """Goes on as `decode`, a token at a time, with states made on the host.

        They are made while the device computes the logits.
        """
        with concurrent.futures.ThreadPoolExecutor(1) as host:
            while True:
                finished = finished | completed_rows(sampling, block, endings)
                room = room - block.valid[:, 0].astype("int32")
                if finished.all():
                    return
                self.reserve(int(self.processed.max()) + 1)
                memory = sampling.grown(memory, self.capacity)
                states = host.submit(sampling.next_states)
                active = np.logical_not(finished)
                # A row that has ended has no room.
                limits = np.where(active, np.int32(self.capacity), 0).astype("int32")
                with self.forgetting_if_it_fails():
                    logits, self.cache = self.engine.step(
                        self.cache,
                        self.capacity,
                        np.maximum(block.tokens[:, 0], 0),
                        self.processed,
                        limits,
                        True,
                    )
                    self.processed = self.processed + active.astype("int32")
                    memory = sampling.with_hosted(memory, states.result())
                    found, logprobs, memory = self.engine.sample(
                        logits, sampling, self.processed, memory
                    )
                    block = block_of_one(found, active, logprobs)
                    check_chosen(block, self.processed)
                at_stop = np.isin(block.tokens[:, 0], endings.stop_token_ids)
                finished = finished | (room <= 1) | at_stop
                finished = finished | endings.reached(block.rows())
                yield block

    def _index(self) -> Index:
        """Returns the rows' positions, as one index if they are equal: it is faster."""
        first = self.processed[0]
        return first if (self.processed == first).all() else self.processed


def pad_stops(stops: tuple[int, ...], sizes: GenerationSizes) -> np.ndarray:
    """Returns stop tokens as an array of one of few sizes; -1 is no token."""
    size = sizes.few_stops
    while size < len(stops):
        size *= 2
    return np.array([*stops, *[-1] * (size - len(stops))], "int32")


def completed_rows(sampling: Sampling, block: Block, endings: Endings) -> np.ndarray:
    """Tells grammars the new tokens of rows; returns which rows they end, `(batch,)`."""
    completed = sampling.take(block.rows())
    endings.completed.update(np.flatnonzero(completed).tolist())
    return completed


def on_host(block: Block, steps: int | None = None) -> Block:
    """Returns the first steps of a block, or all, as NumPy arrays."""
    return tree.map_structure(lambda x: ops.convert_to_numpy(x)[:, :steps], block)


def block_of_one(token: Tensor, valid: np.ndarray, logprobs: Any) -> Block:
    """Returns a block of a token of each row, which `Engine.sample` has chosen."""
    found = tree.map_structure(
        lambda x: ops.convert_to_numpy(x)[:, None], (token, valid, logprobs)
    )
    return Block(*found)


def check_chosen(block: Block, lengths: np.ndarray) -> None:
    """Raises a `ValueError` if a valid token is -1, as no token could be chosen.

    `lengths`, `(batch,)`, is how many tokens were before the first.
    """
    wrong = block.valid & (block.tokens < 0)
    if wrong.any():
        row, step = np.argwhere(wrong)[0]
        raise ValueError(
            f"After {lengths[row] + step} tokens of row {row} (its prompt and new tokens) "
            "the model's logits are NaN or infinite, so no next token can be chosen. "
            f"{BROKEN_LOGITS}"
        )
