"""Speculative decoding: guesses of the next tokens, by rules or by a smaller model."""

from __future__ import annotations

from typing import Any

import keras_hub
import numpy as np

from attention import can_rewind
from attention.contract import check_positive_int, describe
from blocks.generation.endings import NO_ENDINGS
from blocks.generation.engine import Engine
from blocks.generation.prompts import NO_TOKENS
from blocks.generation.running_batch import RunningBatch
from blocks.generation.sources import Sources


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

    def begin_with(self, batch_size: int, sources: Sources | None) -> Any:
        """Returns what `begin` does, for a batch with these sources, if any."""
        return self.begin(batch_size)

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


def check_speculation(speculation: Any, task: Any) -> None:
    """Raises an error if the user's argument can't guess for a model and a call."""
    if speculation is None:
        return
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

    def begin_with(self, batch_size: int, sources: Sources | None) -> _Draft:
        if self._engine is None:
            self._engine = Engine(self.model, keras_hub.samplers.GreedySampler())
        own = sources if self._engine.encoder is not None else None
        return _Draft(RunningBatch(self._engine, batch_size, own))

    def propose(self, memory: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
        return memory.propose(rows, self.num_tokens)


class _Draft:
    """A batch of a draft model, which follows another batch."""

    def __init__(self, batch: RunningBatch) -> None:
        self.batch = batch
        # The tokens that the batch has processed, and a batch to go back to.
        self.seen = [NO_TOKENS] * batch.batch_size
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
