"""The host's side of generation: rows that are continued together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops

from blocks.generation import engine as engine_module
from blocks.generation.engine import Engine
from blocks.generation.state import (
    chunk_length,
    copy_cache,
    join_rows,
    round_up_capacity,
    take_rows,
)
from blocks.generation.token_rows import pad_rows

# The smallest number of stop tokens, which is a shape. -1 is no token.
_FEW_STOPS = 8
# Rows are prefilled in two groups, short and long ones, if that saves as many
# tokens of padding: another group is another compilation.
MIN_TOKENS_SAVED = 256

Block = tuple[np.ndarray, np.ndarray]


class RunningBatch:
    """Rows of tokens that are continued together, each at its own position.

    Args:
        engine: an `Engine`.
        batch_size: int. The number of rows.

    Attributes:
        cache: the cache, or `None` before anything was absorbed.
        capacity: int. The size of the cache.
        absorbed: `int32` array `(batch,)`: how many positions of each row the
            cache has absorbed.
        logits: the logits behind the last prompt of each row; stale for a row
            that has gone on since.
    """

    def __init__(self, engine: Engine, batch_size: int) -> None:
        self.engine = engine
        self.batch_size = batch_size
        self.cache: Any = None
        self.capacity = 0
        self.absorbed = np.zeros((batch_size,), "int32")
        self.logits: Any = None

    def absorb(self, rows: list[np.ndarray], room: int = 0) -> int:
        """Absorbs what rows have beyond the positions that were absorbed.

        Args:
            rows: for each row all its tokens.
            room: int. For how many more positions there is to be space.

        Returns:
            How many tokens that were, in all rows.
        """
        tokens, lengths = pad_rows([x[n:] for x, n in zip(rows, self.absorbed)])
        if not lengths.any():
            return 0
        ahead = min(room, engine_module.BLOCK_STEPS)
        self.reserve(int((self.absorbed + lengths).max()) + ahead)
        groups = [np.arange(self.batch_size)]
        if self.cache is None:
            groups = _groups(lengths, self.capacity)
        old = self.logits
        with self.forgetting_if_it_fails():
            parts = [self._absorb_rows(group, tokens, lengths) for group in groups]
        self.logits, self.cache = parts[0]
        if len(parts) > 1:
            self.logits, self.cache = join_rows(
                parts, np.argsort(np.concatenate(groups))
            )
        if old is not None:
            self.logits = ops.where((lengths > 0)[:, None], self.logits, old)
        self.absorbed = self.absorbed + lengths
        return int(lengths.sum())

    def _absorb_rows(
        self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
    ) -> tuple[Any, Any]:
        capacity = self.capacity
        whole = len(rows) == self.batch_size
        if not whole:
            # A smaller cache has shorter chunks.
            capacity = min(round_up_capacity(int(lengths[rows].max())), capacity)
        logits, cache = self.engine.absorb(
            self.cache, capacity, tokens[rows], self._index(), lengths[rows]
        )
        if capacity < self.capacity:
            cache = self.engine.grow_cache(cache, self.capacity)
        return logits, cache

    @contextlib.contextmanager
    def forgetting_if_it_fails(self) -> Iterator[None]:
        """For a step that may reuse the cache's memory: should it fail, that is lost.

        The rows are then absorbed anew, before they go on.
        """
        try:
            yield
        except BaseException:
            self.cache = self.logits = None
            self.absorbed = np.zeros_like(self.absorbed)
            raise

    def reserve(self, positions: int) -> None:
        """Sees to it that the cache can hold so many positions."""
        if positions <= self.capacity:
            return
        self.capacity = round_up_capacity(positions)
        if self.cache is not None:
            self.cache = self.engine.grow_cache(self.cache, self.capacity)

    def repeat(self, times: int) -> None:
        """Makes each row `times` rows, one behind the other."""
        rows = np.repeat(np.arange(self.batch_size), times)
        self.cache = take_rows(self.cache, rows)
        self.logits = take_rows(self.logits, rows)
        self.absorbed = self.absorbed[rows]
        self.batch_size *= times

    def copy(self) -> RunningBatch:
        """A batch in the same state, which does not affect this one."""
        other = RunningBatch(self.engine, self.batch_size)
        other.cache = None if self.cache is None else copy_cache(self.cache)
        other.capacity, other.absorbed = self.capacity, self.absorbed.copy()
        other.logits = self.logits
        return other

    def sample(
        self, room: np.ndarray, stops: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples the next token of each row from the logits.

        Args:
            room: `int32` array `(batch,)`: how many tokens each row may get.
            stops: `int32` array: the tokens at which a row ends.

        Returns:
            The tokens, and which rows end with them.
        """
        token = to_numpy(self.engine.sample(self.logits))
        return token, (room <= 1) | np.isin(token, stops)

    def decode(
        self, room: np.ndarray, stops: tuple[int, ...], block_steps: int | None = None
    ) -> Iterator[Block]:
        """Continues the rows until each has reached its limit or a stop token.

        The last token of each row is not absorbed.

        Args:
            room: `int32` array `(batch,)`: how many tokens each row may get.
            stops: the tokens at which a row ends; they are part of it.
            block_steps: int or `None`. How many steps to take at once.

        Yields:
            Blocks of new tokens, `(batch, steps)`, and which of them are part
            of the rows.
        """
        if room.max() <= 0:
            return
        stop_array = pad_stops(stops)
        token: Any
        token, finished = self.sample(room, stop_array)
        yield token[:, None], (room > 0)[:, None]
        room = (room - 1).astype("int32")
        index: Any = self._index()
        block = min(block_steps or engine_module.BLOCK_STEPS, engine_module.BLOCK_STEPS)
        device_room: Any = room
        while not finished.all():
            left = np.where(finished, 0, room)
            steps = min(block, int(left.max()))
            self.reserve(int((self.absorbed + np.minimum(left, steps)).max()))
            with self.forgetting_if_it_fails():
                self.cache, token, index, device_room, done, tokens, valid = (
                    self.engine.decode(
                        self.cache,
                        token,
                        index,
                        device_room,
                        finished,
                        np.int32(steps),
                        stop_array,
                    )
                )
                tokens = to_numpy(tokens)[:, :steps]
            valid = to_numpy(valid)[:, :steps]
            finished = to_numpy(done)
            room = room - np.int32(steps)
            self.absorbed = self.absorbed + valid.sum(axis=1, dtype="int32")
            yield tokens, valid

    def _index(self) -> Any:
        """Where the rows stand: one index for all is the faster way to write."""
        first = self.absorbed[0]
        return first if (self.absorbed == first).all() else self.absorbed


def _groups(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Splits rows into short and long ones, where that saves much padding."""
    order = np.argsort(lengths, kind="stable")
    everything = [np.arange(len(lengths))]

    def padded(rows: np.ndarray) -> int:
        longest = int(lengths[rows].max())
        size = capacity
        if len(rows) < len(lengths):
            size = min(round_up_capacity(longest), capacity)
        chunk = chunk_length(len(rows), size)
        return len(rows) * -(-longest // chunk) * chunk

    best, cost = everything, padded(everything[0])
    threshold = min(cost // 2, cost - MIN_TOKENS_SAVED)
    for split in range(1, len(order)):
        groups = [order[:split], order[split:]]
        split_cost = sum(map(padded, groups))
        if split_cost <= threshold and split_cost < cost:
            best, cost = groups, split_cost
    return best


def pad_stops(stops: tuple[int, ...]) -> np.ndarray:
    """Stop tokens as an array of one of few sizes."""
    size = _FEW_STOPS
    while size < len(stops):
        size *= 2
    return np.array([*stops, *[-1] * (size - len(stops))], "int32")


def to_numpy(x: Any) -> np.ndarray:
    """A tensor's values."""
    return ops.convert_to_numpy(x)
