"""Text of tokens: whole rows, and pieces of it as it is generated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from blocks.generation.prompts import NO_TOKENS, pad_rows, to_str, tokenizer_size

# The replacement for bytes that are no character, or not yet one.
_REPLACEMENT = "\ufffd"


def pad_token_id(preprocessor: Any) -> int:
    """Returns the token of padding."""
    for owner in (preprocessor, getattr(preprocessor, "tokenizer", None)):
        pad = getattr(owner, "pad_token_id", None)
        if pad is not None:
            return int(pad)
    return 0


def to_arrays(
    rows: list[np.ndarray], pad_token_id: int, width: int | None = None
) -> dict[str, np.ndarray]:
    """Returns rows as `token_ids` and `padding_mask` of shape `(batch, width)`."""
    token_ids, lengths = pad_rows(rows, width, pad_token_id)
    padding_mask = np.arange(token_ids.shape[1])[None] < lengths[:, None]
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def detokenize(rows: list[np.ndarray], preprocessor: Any) -> list[str]:
    """Returns rows of tokens as strings."""
    arrays = to_arrays(rows, pad_token_id(preprocessor))
    # That of an encoder-decoder model looks for these names.
    arrays |= {f"decoder_{name}": x for name, x in arrays.items()}
    texts = preprocessor.generate_postprocess(arrays)
    if hasattr(texts, "numpy"):
        texts = texts.numpy()
    return [to_str(text) for text in texts]


class TextPieces:
    """Turns new tokens of rows into pieces of text.

    A piece is the growth of the text of all tokens so far. Bytes that are not yet a
    character are held back, and so is what may become a stop string. A row's text ends
    before the first of these, except in its prompt.

    Args:
        batch_size: int. The number of rows.
        preprocessor: makes text of tokens.
        stop: for each row its stop strings, or empty.
        prompts: for each row the tokens that its new ones follow, or empty. Their text is
            in no piece, but decides on what follows: a decoder may begin each text
            without a space.

    Attributes:
        given: the text of each row so far.
        stopped: for each row whether it has reached a stop string.
    """

    def __init__(
        self,
        batch_size: int,
        preprocessor: Any,
        stop: tuple[tuple[str, ...], ...] = (),
        prompts: Sequence[np.ndarray] = (),
    ) -> None:
        self._preprocessor = preprocessor
        self._rows = [NO_TOKENS] * batch_size
        self._before = [""] * batch_size
        self.given = [""] * batch_size
        self._stop = stop or ((),) * batch_size
        self._starts = [0] * batch_size
        self.stopped = [False] * batch_size
        self._replacements = _REPLACEMENT
        tokenizer = getattr(preprocessor, "tokenizer", None)
        own = getattr(tokenizer, "replacement_char", None)
        if isinstance(own, int):
            # `ByteTokenizer` has a replacement of its own.
            self._replacements += chr(own)
        if prompts:
            self._read_ends(prompts)

    def _read_ends(self, prompts: Sequence[np.ndarray]) -> None:
        """Keeps as many last tokens of prompts as have text of whole characters."""
        size = tokenizer_size(self._preprocessor)
        # Other tokens of the model have no text.
        known = [row if size is None else row[row < size] for row in prompts]
        count, longest = 4, max(map(len, known))
        while True:
            self._rows = [row[-count:] for row in known]
            self._before = self._decode(self._rows, [""] * len(prompts))
            broken = any(x in text for text in self._before for x in self._replacements)
            if count >= longest or (all(self._before) and not broken):
                return
            count *= 2

    def add_prompts(self, rows: list[np.ndarray]) -> list[str]:
        """Returns the text of the prompts, in which stop strings may be."""
        stop, self._stop = self._stop, ((),) * len(rows)
        texts = self.add(rows)
        self._stop, self._starts = stop, [len(x) for x in self.given]
        return texts

    def add(self, new: list[np.ndarray], finished: bool = False) -> list[str]:
        """Returns a piece for each row's new tokens, which are the last if `finished`."""
        self._rows = [
            row if stopped else np.concatenate([row, x])
            for row, x, stopped in zip(self._rows, new, self.stopped)
        ]
        if finished and not any(self.stopped):
            texts = detokenize(self._rows, self._preprocessor)
        else:
            given = [a + b for a, b in zip(self._before, self.given)]
            texts = self._decode(self._rows, given)
        return [self._piece(row, text, finished) for row, text in enumerate(texts)]

    def _decode(self, rows: list[np.ndarray], given: list[str]) -> list[str]:
        try:
            return detokenize(rows, self._preprocessor)
        except UnicodeDecodeError:
            # A strict decoder refuses parts of a character; the rest may follow.
            return [self._text(*pair) for pair in zip(rows, given)]

    def _text(self, row: np.ndarray, given: str) -> str:
        try:
            return detokenize([row], self._preprocessor)[0]
        except UnicodeDecodeError:
            return given

    def _piece(self, row: int, text: str, finished: bool) -> str:
        given, stop, start = self.given[row], self._stop[row], self._starts[row]
        if self.stopped[row]:
            return ""
        # New tokens may complete the last character of the prompt.
        pairs = zip(text, self._before[row])
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        text = text[len(list(same)) :]
        if not finished:
            text = text.rstrip(self._replacements)
        if stop:
            place = find_stop(text, stop, start)
            self.stopped[row] = place is not None
            if place is None and not finished:
                place = len(text) - held_back(text, stop, start)
            text = text[:place]
        if not finished and not text.startswith(given):
            # The next tokens decide how these are decoded.
            return ""
        self.given[row] = text
        return text[len(given) :]


def find_stop(text: str, stops: tuple[str, ...], start: int = 0) -> int | None:
    """Returns where the first of some strings begins in a text, or `None`."""
    places = [place for x in stops if (place := text.find(x, start)) >= 0]
    return min(places, default=None)


def held_back(text: str, stops: tuple[str, ...], start: int = 0) -> int:
    """Returns how many last characters may become one of some strings."""
    longest = max(map(len, stops), default=1) - 1
    for count in range(min(longest, len(text) - start), 0, -1):
        if any(x.startswith(text[-count:]) for x in stops):
            return count
    return 0
