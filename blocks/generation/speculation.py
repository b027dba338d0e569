"""Speculative decoding: several guessed tokens are verified by one step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras_hub
import numpy as np
from keras import ops, tree

from attention import can_rewind
from attention.contract import Cache, Tensor, check_positive_int, describe
from blocks.generation.compilation import StepKey
from blocks.generation.endings import NO_ENDINGS, Endings
from blocks.generation.engine import Engine, is_any
from blocks.generation.options import Options
from blocks.generation.prompts import NO_TOKENS, pad_rows
from blocks.generation.running_batch import (
    Block,
    RunningBatch,
    check_chosen,
    on_host,
    pad_stops,
)
from blocks.generation.sampling import Memory, Sampling


class Speculation:
    """Guesses the next tokens, which the model then verifies in one step.

    The model samples a token at every position, as it would without guesses. Each
    guess that equals the sampled token saves a step, and all after the first that does
    not are dropped. So the outputs have the same distribution as without speculation,
    with any guesses and any sampler; with greedy sampling they are the same.

    A subclass implements `propose`, and `begin` if it keeps a state.

    Args:
        num_tokens: int. How many tokens to guess at once.

    Reference:

    - [Leviathan et al., 2022](https://arxiv.org/abs/2211.17192)
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = check_positive_int("num_tokens", num_tokens)

    def check(self, task: Any) -> None:
        """Raises an error if this can't guess for `task`, before any work is done."""

    def begin(self, batch_size: int) -> Any:
        """Returns the state that `propose` keeps for one batch; `None` here."""
        return None

    def propose(self, memory: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
        """Guesses the next tokens of rows.

        Args:
            memory: the state that `begin` returned for this batch.
            rows: for each row its tokens so far; an empty one needs no guess.

        Returns:
            For each row an `int32` array of up to `num_tokens` tokens.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `propose(memory, rows)`: up to "
            "`num_tokens` tokens for each row."
        )


def check_speculation(speculation: Any, task: Any, options: Mapping[str, Any]) -> None:
    """Raises an error if the user's argument can't guess for a model and a call."""
    if speculation is None:
        return
    if options.get("grammar") is not None:
        raise ValueError(
            "`grammar` does not go with `speculation` yet: leave one of them out."
        )
    if not isinstance(speculation, Speculation):
        raise TypeError(
            "`speculation` must be `blocks.PromptLookup()`, "
            "`blocks.DraftModel(model)` or another `blocks.Speculation`. "
            f"Received: speculation={describe(speculation)}"
        )
    speculation.check(task)


class PromptLookup(Speculation):
    """Guesses that the last few tokens are followed by the same tokens as before.

    It costs nothing, and helps where the output repeats parts of the prompt:
    summaries, edits of code, questions about a text.

    Args:
        num_tokens: int. How many tokens to guess at once.
        max_ngram: int. How many last tokens to look for; if they did not occur before,
            one less is looked for, down to `min_ngram`.
        min_ngram: int. The smallest number of tokens to look for.

    Example:

    >>> import numpy as np
    >>> from blocks import PromptLookup
    >>> row = np.array([5, 1, 2, 3, 9, 1, 2])
    >>> PromptLookup(num_tokens=2).propose(None, [row])[0].tolist()
    [3, 9]

    Reference:

    - [Saxena, 2023](https://github.com/apoorvumang/prompt-lookup-decoding)
    """

    def __init__(
        self, num_tokens: int = 8, max_ngram: int = 3, min_ngram: int = 1
    ) -> None:
        super().__init__(num_tokens)
        self.max_ngram = check_positive_int("max_ngram", max_ngram)
        self.min_ngram = check_positive_int("min_ngram", min_ngram)
        if min_ngram > max_ngram:
            raise ValueError(
                "`min_ngram` must be at most `max_ngram`. Received: "
                f"min_ngram={min_ngram}, max_ngram={max_ngram}"
            )

    def propose(self, memory: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
        return [self._look_up(np.asarray(row, "int32")) for row in rows]

    def _look_up(self, row: np.ndarray) -> np.ndarray:
        for size in range(self.max_ngram, self.min_ngram - 1, -1):
            if len(row) <= size:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(row[:-1], size)
            found = np.flatnonzero((windows == row[-size:]).all(axis=1))
            if len(found):
                start = found[-1] + size
                return row[start : start + self.num_tokens]
        return row[:0]


class DraftModel(Speculation):
    """Guesses with a smaller model of the same vocabulary.

    Args:
        model: a `blocks.CausalLM`. It need not be compiled: it guesses its most likely
            tokens, with any sampler.
        num_tokens: int. How many tokens to guess at once.

    Raises:
        TypeError: if `model` is no `blocks.CausalLM`.

    Example:

    >>> import numpy as np
    >>> from blocks import CausalLM, CustomBackbone, DraftModel
    >>> lm, small = (
    ...     CausalLM(CustomBackbone(50, layers, 2, 16, 32, max_sequence_length=32))
    ...     for layers in (2, 1)
    ... )
    >>> lm.compile(sampler="greedy")
    >>> prompt = {"token_ids": np.array([1, 2, 3]), "padding_mask": np.ones(3)}
    >>> options = dict(stop_token_ids=None, max_new_tokens=6)
    >>> fast = lm.generate(prompt, **options, speculation=DraftModel(small))
    >>> bool((fast["token_ids"] == lm.generate(prompt, **options)["token_ids"]).all())
    True

    Reference:

    - [Leviathan et al., 2022](https://arxiv.org/abs/2211.17192)
    """

    def __init__(self, model: Any, num_tokens: int = 4) -> None:
        super().__init__(num_tokens)
        if not hasattr(model, "decode_step") or not hasattr(model, "backbone"):
            raise TypeError(
                f"`model` must be a `blocks.CausalLM`. Received: {describe(model)}"
            )
        self.model = model
        self._engine: Engine | None = None

    def check(self, task: Any) -> None:
        sizes = [lm.output.shape[-1] for lm in (task, self.model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The draft model knows {sizes[1]} tokens and the model {sizes[0]}: "
                "they need the same vocabulary."
            )

    def begin(self, batch_size: int) -> _Draft:
        if self._engine is None:
            self._engine = Engine(self.model, keras_hub.samplers.GreedySampler())
        return _Draft(self._engine, batch_size)

    def propose(self, memory: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
        return memory.propose(rows, self.num_tokens)


class _Draft:
    """A batch of a draft model, which follows another batch."""

    def __init__(self, engine: Engine, batch_size: int) -> None:
        self.batch = RunningBatch(engine, batch_size)
        # The tokens that the batch has processed, and a batch to go back to.
        self.seen = [NO_TOKENS] * batch_size
        self.before: tuple[RunningBatch, list[np.ndarray]] | None = None

    def propose(self, rows: list[np.ndarray], num_tokens: int) -> list[np.ndarray]:
        asked = np.array([len(row) > 0 for row in rows])
        # A row that is finished stays as it is.
        rows = [row if len(row) else seen for row, seen in zip(rows, self.seen)]
        limit = self.batch.engine.max_positions
        if limit is not None:
            num_tokens = min(num_tokens, limit - max(map(len, rows)))
        if num_tokens < 1:
            return [row[:0] for row in rows]
        self._go_back(rows, asked)
        self.batch.process(rows, num_tokens)
        self.seen = [np.asarray(row, "int32") for row in rows]
        batch = self.batch
        reached, least = int(batch.processed.max()), int(batch.processed.min())
        end = reached + num_tokens
        if not can_rewind(batch.engine.sites, batch.cache, end, least):
            self.before = (batch.copy(), self.seen)
        room = np.where(asked, num_tokens, 0).astype("int32")
        found = [x.tokens for x in self.batch.decode(rows, room, NO_ENDINGS)]
        guesses = [
            row if ask else row[:0] for row, ask in zip(np.concatenate(found, 1), asked)
        ]
        # The last token is not processed.
        self.seen = [np.append(a, b[:-1]) for a, b in zip(self.seen, guesses)]
        return guesses

    def _go_back(self, rows: list[np.ndarray], asked: np.ndarray) -> None:
        """Takes back tokens that were processed but are wrong."""
        if self.before is not None:
            self.batch, self.seen = self.before
            self.before = None
        right = self.batch.processed.copy()
        for i in np.flatnonzero(asked):
            # The last token is processed again, as its logits are needed.
            kept = min(right[i], len(rows[i]) - 1)
            wrong = np.flatnonzero(rows[i][:kept] != self.seen[i][:kept])
            right[i] = wrong[0] if len(wrong) else kept
        self.batch.processed = right


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
    guesser = speculation.begin(len(rows))
    sampling = engine.sampling(options)
    stop_array = pad_stops(endings.stop_token_ids, batch.sizes)
    memory = sampling.begin(rows, batch.capacity)
    block, finished, memory = batch.sample(sampling, room, stop_array, memory)
    finished = finished | endings.reached(block.rows())
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
        given = [np.append(a[-1:], b[:n]) for a, b, n in zip(rows, proposed, counts)]
        tokens, _ = pad_rows(given, guesses + 1)
        least = int(batch.processed.min())
        reached = int(np.where(finished, 0, batch.processed + 1 + counts).max())
        batch.reserve(reached)
        # A small cache may not take that many guesses at once.
        width = min(guesses + 1, batch.capacity, engine.max_positions or batch.capacity)
        tokens, counts = tokens[:, :width], np.minimum(counts, width - 1)
        rewinds = can_rewind(engine.sites, batch.cache, reached, least)
        memory = sampling.grown(memory, batch.capacity)
        state = (tokens, counts, batch.processed, room, memory, finished, stop_array)
        with batch.forgetting_if_it_fails():
            batch.cache, memory, *found = engine.functions.run(
                StepKey("verify", len(rows), batch.capacity, width, variant=rewinds),
                functools.partial(_make_verify, engine, rewinds),
                (batch.cache, *state, sampling.settings),
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
        yield block


def _make_verify(engine: Engine, rewinds: bool, sampling: Sampling) -> Callable:
    def verify(cache: Cache, *args: Any) -> tuple[Cache, Any, Tensor, Tensor, Any]:
        tokens, counts, index, room, memory, finished, stops, settings = args
        width = tokens.shape[1]
        places = ops.arange(width, dtype="int32")[None]
        active = ops.logical_not(finished)[:, None]
        mask = ops.logical_and(places <= counts[:, None], active)
        hidden, updated = engine.forward(cache, tokens, index, mask, donate=rewinds)
        logits = engine.task.compute_logits(hidden)  # (rows, width, vocabulary)
        sampled, logprobs, memories = _choose_all(
            sampling, logits, tokens, index, settings, memory
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
