"""Text as it is made: pieces that joined are what `generate` returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from blocks.generation.running_batch import Block

# What a decoder writes where bytes are no character, or not yet one.
_REPLACEMENT = "\ufffd"


def detokenize(rows: list[np.ndarray], preprocessor: Any, pad_token_id: int) -> list:
    """Turns rows of tokens into strings.

    Args:
        rows: `int32` arrays, one for each row.
        preprocessor: has `generate_postprocess`.
        pad_token_id: int. What rows are padded with.

    Returns:
        A list of strings.
    """
    # Some tokenizers don't take rows of no tokens.
    width = max(1, *map(len, rows))
    token_ids = np.full((len(rows), width), pad_token_id, "int32")
    padding_mask = np.zeros((len(rows), width), "bool")
    for row, tokens in enumerate(rows):
        token_ids[row, : len(tokens)] = tokens
        padding_mask[row, : len(tokens)] = True
    texts = preprocessor.generate_postprocess(
        {"token_ids": token_ids, "padding_mask": padding_mask}
    )
    if hasattr(texts, "numpy"):
        texts = texts.numpy()
    return [
        x.decode("utf-8", errors="replace") if isinstance(x, bytes) else str(x)
        for x in texts
    ]


class TextPieces:
    """Turns the tokens of rows into pieces of text, as they come.

    A piece is what the text of all tokens so far has grown by. Bytes that are
    not yet a character are held back.

    Args:
        rows: for each row its tokens before the first piece.
        preprocessor: has `generate_postprocess`.
        pad_token_id: int. What rows are padded with.
    """

    def __init__(
        self, rows: list[np.ndarray], preprocessor: Any, pad_token_id: int
    ) -> None:
        self._rows = rows
        self._preprocessor = preprocessor
        self._pad_token_id = pad_token_id
        self._given = [""] * len(rows)

    def first(self) -> list[str]:
        """The text of the tokens that were there before."""
        return self.add([np.zeros((0,), "int32")] * len(self._rows), False)

    def add(self, new: list[np.ndarray], finished: bool) -> list[str]:
        """Returns the pieces for new tokens.

        Args:
            new: for each row its new tokens.
            finished: bool. Whether there will be no more.

        Returns:
            A string for each row.
        """
        self._rows = [np.concatenate(pair) for pair in zip(self._rows, new)]
        texts = detokenize(self._rows, self._preprocessor, self._pad_token_id)
        return [self._piece(row, text, finished) for row, text in enumerate(texts)]

    def _piece(self, row: int, text: str, finished: bool) -> str:
        given = self._given[row]
        if not finished:
            text = text.rstrip(_REPLACEMENT)
            if not text.startswith(given):
                # What comes next tells how these tokens are to be read.
                return ""
        self._given[row] = text
        return text[len(given) :]


def stream_text(
    blocks: Iterable[Block], prompts: list[np.ndarray] | None, pieces: TextPieces
) -> Iterator[list[str]]:
    """Yields a list with a string for each row, as tokens are made.

    Args:
        blocks: new tokens and which of them are part of the rows.
        prompts: the prompts, where they are part of the text, else `None`.
        pieces: a `TextPieces` that begins with the prompts, or with nothing.
    """
    if prompts is not None:
        yield pieces.first()
    rows = 0
    for tokens, valid in blocks:
        rows = len(tokens)
        found = pieces.add(
            [row[mask] for row, mask in zip(tokens, valid)], finished=False
        )
        if any(found):
            yield found
    if rows:
        last = pieces.add([np.zeros((0,), "int32")] * rows, finished=True)
        if any(last):
            yield last


def stream_tokens(
    blocks: Iterable[Block], prompts: list[np.ndarray] | None
) -> Iterator[list[np.ndarray]]:
    """Yields a list with an array of tokens for each row, as they are made."""
    if prompts is not None:
        yield prompts
    for tokens, valid in blocks:
        yield [row[mask] for row, mask in zip(tokens, valid)]
