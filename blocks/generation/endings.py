"""At what rows end: stop tokens, and stop strings that several tokens may make up."""

from __future__ import annotations

import bisect
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from attention.contract import describe
from blocks.generation.prompts import NO_TOKENS, vocabulary_size
from blocks.generation.texts import TextPieces


class Endings:
    """At what the rows of one generation end, besides their limits.

    Args:
        stop_token_ids: tuple of the tokens at which a row ends.
        stop: for each row the strings before which its text ends, or empty.
        preprocessor: makes text of tokens; needed for `stop`.
        prompts: for each row the tokens before its new ones; needed for `stop`.

    Attributes:
        kept: by row, for those that have reached a stop string, how many of its new tokens
            have no character of it.
        seen: by row, for the same, how many new tokens there are with it.
        completed: the rows whose grammar allows no more.
    """

    def __init__(
        self,
        stop_token_ids: tuple[int, ...] = (),
        stop: tuple[tuple[str, ...], ...] = (),
        preprocessor: Any = None,
        prompts: Sequence[np.ndarray] = (),
    ) -> None:
        self.stop_token_ids = stop_token_ids
        self.stop = stop
        self.kept: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.completed: set[int] = set()
        self._preprocessor = preprocessor
        self._prompts = prompts if stop else ()
        self._new = [NO_TOKENS] * len(stop)
        self._counted = [0] * len(stop)
        self._pieces = TextPieces(len(stop), preprocessor, stop, self._prompts)

    def reached(self, new: list[np.ndarray]) -> np.ndarray:
        """Returns which rows have reached a stop string with their new tokens."""
        if not self.stop:
            return np.zeros((len(new),), "bool")
        before = list(self._pieces.stopped)
        self._pieces.add(new)
        for row, (was, stopped) in enumerate(zip(before, self._pieces.stopped)):
            if not was:
                self._new[row] = np.concatenate([self._new[row], new[row]])
            if stopped and not was:
                self.kept[row] = self._count(row)
                self.seen[row] = self._count_with_stop(row)
        return np.array(self._pieces.stopped)

    def cut(self, row: int, new: np.ndarray) -> np.ndarray:
        """Returns the new tokens of a row, without those of its stop string."""
        return new[: self.kept.get(row, len(new))]

    def reason(self, row: int, new: np.ndarray) -> str:
        """Returns `"stop"` if a row ended at a stop, or `"length"` at its limit."""
        at_token = len(new) > 0 and int(new[-1]) in self.stop_token_ids
        stopped = at_token or row in self.kept or row in self.completed
        return "stop" if stopped else "length"

    def count_given(self, row: int) -> int:
        """Returns how many new tokens, since the last call, are no part of a stop string.

        Those that may become one are counted later.
        """
        count = self.kept.get(row, self._count(row))
        more, self._counted[row] = count - self._counted[row], count
        return more

    def _count_with_stop(self, row: int) -> int:
        new, stop = self._new[row], (self.stop[row],)
        prompt = self._prompts[row : row + 1]

        def is_stopped(count: int) -> bool:
            pieces = TextPieces(1, self._preprocessor, stop, prompt)
            pieces.add([new[:count]])
            return pieces.stopped[0]

        return bisect.bisect_left(range(len(new)), True, key=is_stopped)

    def _count(self, row: int) -> int:
        """Returns how many new tokens make up the text of a row so far."""
        new, prompt = self._new[row], self._prompts[row : row + 1]

        def length(count: int) -> int:
            pieces = TextPieces(1, self._preprocessor, (), prompt)
            return len(pieces.add([new[:count]])[0])

        def first(wanted: int) -> int:
            return bisect.bisect_left(range(len(new)), wanted, key=length)

        wanted = len(self._pieces.given[row])
        count = first(wanted)
        # A token may have characters of both.
        return count if length(count) == wanted else first(length(count - 1))


# At a limit only. It keeps nothing.
NO_ENDINGS = Endings()


def read_stop_strings(
    value: Any, task: Any, count: int, times: int
) -> tuple[tuple[str, ...], ...]:
    """Returns the stop strings of each row, of `count` prompts with `times` rows each.

    Raises:
        TypeError: if one is no string, or empty.
        ValueError: if there is no preprocessor, or not a list for each prompt.
    """
    if task.preprocessor is None:
        raise ValueError(
            "`stop` is text, but the model has no `preprocessor` that makes text of "
            "tokens. Pass `stop_token_ids`, or make the model with a preprocessor."
        )
    if isinstance(value, str):
        value = [value]
    each = list(value) if isinstance(value, (list, tuple)) else [value]
    if not any(isinstance(x, (list, tuple)) for x in each):
        each = [each] * count
    if len(each) != count:
        raise ValueError(
            f"A list of lists as `stop` must have one for each of {count} prompts. "
            f"Received: stop={describe(value)}"
        )
    each = [[x] if isinstance(x, str) else x or () for x in each]
    for stops in each:
        if not all(isinstance(x, str) and x for x in stops):
            raise TypeError(
                "`stop` must be a string that is not empty, a list of them, or such a "
                f"list for each prompt. Received: stop={describe(value)}"
            )
    return tuple(tuple(x) for x in each for _ in range(times))


def resolve_stops(stop_token_ids: Any, task: Any) -> tuple[int, ...]:
    """Returns the tokens at which rows end.

    An empty tuple means that no token ends a row. `"auto"` asks the preprocessor.
    """
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if task.preprocessor is None:
            raise ValueError(
                'With `stop_token_ids="auto"` rows end at the end token of the '
                "preprocessor, but the model has no preprocessor. Pass "
                "`stop_token_ids=None` to end at `max_length`, or token ids."
            )
        stops = getattr(task.preprocessor, "stop_token_ids", None)
        if stops is None:
            stops = end_token_ids(task.preprocessor)
        if not stops:
            warnings.warn(
                "The preprocessor has no end token, so rows end at `max_length` or "
                "`max_new_tokens` only. Pass `stop_token_ids=None` to say so.",
                stacklevel=3,
            )
        return stops
    several = hasattr(stop_token_ids, "__iter__")
    given = stop_token_ids if several else [stop_token_ids]
    try:
        stops = tuple(map(operator.index, given))
    except (TypeError, ValueError):
        raise TypeError(
            '`stop_token_ids` must be None, "auto", a token id or a list of them. '
            f"Received: stop_token_ids={describe(stop_token_ids)}"
        ) from None
    size = vocabulary_size(task)
    wrong = [x for x in stops if x < 0 or (size is not None and x >= size)]
    if wrong:
        raise ValueError(
            "`stop_token_ids` must be in the model's vocabulary of "
            f"{size} tokens. Received: {wrong[0]}"
        )
    return stops


def end_token_ids(preprocessor: Any) -> tuple[int, ...]:
    """Returns the end tokens of our preprocessors, or of KerasHub's tokenizers."""
    tokenizer = getattr(preprocessor, "tokenizer", None)
    ids = [getattr(preprocessor, "end_token_id", None)]
    if getattr(preprocessor, "end_token", None) is None:
        # Llama 3 has two: of a message and of a text.
        ids += [getattr(tokenizer, f"end_token{i}_id", None) for i in ("", "2")]
    return tuple(dict.fromkeys(int(x) for x in ids if x is not None))
