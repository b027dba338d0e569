"""Logits processors: what changes the logits before a token is chosen."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from attention.contract import Tensor


class TokensSoFar(NamedTuple):
    """All tokens of each row, when the next one is chosen.

    Attributes:
        token_ids: `int32` tensor `(rows, width)`: prompt and new tokens. What is behind
            the end of a row has no meaning.
        lengths: `int32` tensor `(rows,)`: how many there are, which is also the position of
            the token that is chosen.
        prompt_lengths: `int32` tensor `(rows,)`: how many of them are the prompt's.
    """

    token_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor

    def mask(self) -> Tensor:
        """Returns which of `token_ids` are part of the rows, `(rows, width)`."""
        places = ops.arange(self.token_ids.shape[1], dtype="int32")[None]
        return places < self.lengths[:, None]

    def new_mask(self) -> Tensor:
        """Returns which of `token_ids` are new, `(rows, width)`."""
        places = ops.arange(self.token_ids.shape[1], dtype="int32")[None]
        return ops.logical_and(self.mask(), places >= self.prompt_lengths[:, None])

    def counts(self, mask: Tensor, vocabulary_size: int) -> Tensor:
        """Returns how often each token is among those of a mask.

        It is a `float32` tensor `(rows, vocabulary_size)`.
        """
        rows, width = self.token_ids.shape
        row = ops.repeat(ops.arange(rows, dtype="int32"), width)
        places = ops.stack([row, ops.reshape(self.token_ids, (-1,))], axis=1)
        ones = ops.reshape(ops.cast(mask, "float32"), (-1,))
        return ops.scatter(places, ones, (rows, vocabulary_size))


class LogitsProcessor:
    """Changes the logits of the next token of each row, in the compiled decode loop.

    A subclass overrides `call`, and `create_state` if it keeps a state. Pass it as
    `lm.generate(..., processors=[MyProcessor()])`. It is called once for each new token of
    a row, in their order, on every backend, with batches, streams, sessions and
    speculation.

    What `call` reads from the object itself is fixed when a step is compiled, and another
    object is compiled anew: pass the same one again. Numbers that change from call to call
    belong into the state.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from blocks import CausalLM, CustomBackbone, LogitsProcessor
    >>> class OnlyEven(LogitsProcessor):
    ...     def call(self, logits, tokens, state):
    ...         is_odd = ops.arange(logits.shape[-1]) % 2 == 1
    ...         return ops.where(is_odd, -float("inf"), logits), state
    >>> lm = CausalLM(CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32))
    >>> lm.compile(sampler="greedy")
    >>> options = dict(stop_token_ids=None, max_new_tokens=5, strip_prompt=True)
    >>> new = lm.generate([[1, 2, 3]], **options, processors=[OnlyEven()])["token_ids"]
    >>> bool((new % 2 == 0).all())
    True
    """

    def create_state(self, tokens: TokensSoFar) -> Any:
        """Returns the state before the first new token; `()` here.

        Args:
            tokens: a `blocks.TokensSoFar` of NumPy arrays: the prompts.

        Returns:
            A pytree of arrays, the axis of rows first.
        """
        return ()

    def call(
        self, logits: Tensor, tokens: TokensSoFar, state: Any
    ) -> tuple[Tensor, Any]:
        """Returns the changed logits, and the state after this token.

        Args:
            logits: `float32` tensor `(rows, vocabulary_size)`; -inf means never.
            tokens: a `blocks.TokensSoFar`.
            state: as `create_state` or the last call returned it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `call(logits, tokens, state)`, which "
            "returns the changed logits and the state."
        )

    def fixed(self) -> Any:
        """Returns what is fixed in a compiled step; two that are equal share it.

        It is the object itself, unless a subclass says that the state is all that differs.
        """
        return self


class HostProcessor(LogitsProcessor):
    """A processor whose state is made on the host, anew for each token.

    Rows are then continued a token at a time; the state is made while the device
    computes the next logits.
    """

    def take(self, new: list[np.ndarray]) -> np.ndarray:
        """Takes the new tokens of each row; returns which rows end with them, `(rows,)`."""
        raise NotImplementedError

    def next_state(self) -> Any:
        """Returns the state with which the next token is chosen."""
        raise NotImplementedError

    def look_ahead(
        self, guesses: list[np.ndarray], width: int
    ) -> tuple[Any, np.ndarray]:
        """Returns the states with which a row's next tokens are chosen if it is guessed.

        Args:
            guesses: for each row tokens that may come next.
            width: int. More than any row's guesses.

        Returns:
            The states, `(width, rows, ...)`: the first is `next_state()`, and another is
            that after the guesses before it; and how many guesses of each row are
            possible and do not end it, `(rows,)`: states behind these have no meaning.
        """
        raise NotImplementedError


class Switched(LogitsProcessor):
    """A processor of some rows of a batch, which leaves the others as they are.

    Args:
        processor: the `LogitsProcessor`.
        on: bool array `(rows,)`. Which rows have it.
    """

    def __init__(self, processor: LogitsProcessor, on: np.ndarray) -> None:
        self.processor, self.on = processor, on

    def create_state(self, tokens: TokensSoFar) -> Any:
        return self.on, self.processor.create_state(tokens)

    def call(
        self, logits: Tensor, tokens: TokensSoFar, state: Any
    ) -> tuple[Tensor, Any]:
        on, inner = state
        changed, inner = self.processor.call(logits, tokens, inner)
        return ops.where(on[:, None], changed, logits), (on, inner)

    def fixed(self) -> Any:
        return type(self), self.processor.fixed()


class _NumbersProcessor(LogitsProcessor):
    """A processor with a number for each row, which subclasses `change` logits by.

    Args:
        numbers: array `(rows,)`. Where all are `neutral`, no work is done.
    """

    neutral = 0.0

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def create_state(self, tokens: TokensSoFar) -> Any:
        return self.numbers

    def call(
        self, logits: Tensor, tokens: TokensSoFar, state: Any
    ) -> tuple[Tensor, Any]:
        changed = ops.cond(
            ops.any(state != self.neutral),
            lambda: self.change(logits, tokens, state[:, None]),
            lambda: logits,
        )
        return changed, state

    def change(self, logits: Tensor, tokens: TokensSoFar, number: Tensor) -> Tensor:
        """Returns the changed logits; `number` is of shape `(rows, 1)`."""
        raise NotImplementedError

    def fixed(self) -> Any:
        return type(self)


class RepetitionPenalty(_NumbersProcessor):
    """Makes tokens that are in a row already less likely: its prompt counts, too.

    A positive logit is divided by the penalty, a negative one multiplied.

    Reference:

    - [Keskar et al., 2019](https://arxiv.org/abs/1909.05858)
    """

    neutral = 1.0

    def change(self, logits: Tensor, tokens: TokensSoFar, number: Tensor) -> Tensor:
        seen = tokens.counts(tokens.mask(), logits.shape[-1]) > 0
        lower = ops.where(logits < 0, logits * number, logits / number)
        return ops.where(seen, lower, logits)


class PresencePenalty(_NumbersProcessor):
    """Subtracts a number from the logits of tokens that were generated already."""

    def change(self, logits: Tensor, tokens: TokensSoFar, number: Tensor) -> Tensor:
        count = tokens.counts(tokens.new_mask(), logits.shape[-1])
        return logits - number * ops.cast(count > 0, "float32")


class FrequencyPenalty(_NumbersProcessor):
    """Subtracts a number for each time that a token was generated already."""

    def change(self, logits: Tensor, tokens: TokensSoFar, number: Tensor) -> Tensor:
        return logits - number * tokens.counts(tokens.new_mask(), logits.shape[-1])


class NoRepeatNgram(_NumbersProcessor):
    """Allows no sequence of so many tokens twice in a row; 0 means any."""

    neutral = 0

    def change(self, logits: Tensor, tokens: TokensSoFar, number: Tensor) -> Tensor:
        ids, lengths, size = tokens.token_ids, tokens.lengths, number
        width = ids.shape[1]
        places = ops.arange(width, dtype="int32")[None]

        # How many tokens before each place equal the row's last ones, up to size - 1.
        def longer(step: Tensor, equal: Tensor, count: Tensor) -> tuple:
            last = ops.take_along_axis(
                ids, ops.clip(lengths[:, None] - 1 - step, 0, width - 1), axis=1
            )
            before = ops.take(ids, ops.clip(places[0] - 1 - step, 0, width - 1), axis=1)
            inside = ops.logical_and(step < size - 1, places - 1 - step >= 0)
            equal = ops.logical_and(equal, ops.logical_and(inside, before == last))
            return step + 1, equal, count + ops.cast(equal, "int32")

        _, _, count = ops.while_loop(
            lambda step, *_: step < ops.max(size) - 1,
            longer,
            (
                ops.zeros((), dtype="int32"),
                ops.ones(ids.shape, dtype="bool"),
                ops.zeros(ids.shape, dtype="int32"),
            ),
        )
        repeats = ops.logical_and(count >= size - 1, places < lengths[:, None])
        repeats = ops.logical_and(repeats, size > 0)
        # A row that is shorter than a sequence has none.
        repeats = ops.logical_and(repeats, lengths[:, None] >= size)
        banned = tokens.counts(repeats, logits.shape[-1]) > 0
        return ops.where(banned, -math.inf, logits)


class LogitBias(LogitsProcessor):
    """Adds numbers to the logits of some tokens.

    Args:
        token_ids: `int32` array `(rows, count)`.
        biases: `float32` array `(rows, count)`, 0 where a row has fewer.
    """

    def __init__(self, token_ids: np.ndarray, biases: np.ndarray) -> None:
        self.token_ids, self.biases = token_ids, biases

    def create_state(self, tokens: TokensSoFar) -> Any:
        return self.token_ids, self.biases

    def call(
        self, logits: Tensor, tokens: TokensSoFar, state: Any
    ) -> tuple[Tensor, Any]:
        token_ids, biases = state
        given = TokensSoFar(token_ids, *tokens[1:])
        return logits + given.counts(biases, logits.shape[-1]), state

    def fixed(self) -> Any:
        return type(self)
