"""Text as it is generated: pieces that together are the result of `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from blocks.generation.running_batch import Block
from blocks.generation.token_rows import NO_TOKENS, pad_token_id, to_arrays

# The replacement for bytes that are no character, or not yet one.
_REPLACEMENT = "\ufffd"


def detokenize(rows: list[np.ndarray], preprocessor: Any) -> list[str]:
    """Turns rows of tokens into strings.

    Args:
        rows: `int32` arrays, one for each row.
        preprocessor: has `generate_postprocess`.

    Returns:
        A list of strings.
    """
    texts = preprocessor.generate_postprocess(
        to_arrays(rows, pad_token_id(preprocessor))
    )
    if hasattr(texts, "numpy"):
        texts = texts.numpy()
    return [
        x.decode("utf-8", errors="replace") if isinstance(x, bytes) else str(x)
        for x in texts
    ]


class TextPieces:
    """Turns new tokens of rows into pieces of text.

    A piece is the growth of the text of all tokens so far. Bytes that are not yet a
    character are held back.

    Args:
        rows: for each row its tokens before the first piece.
        preprocessor: has `generate_postprocess`.
    """

    def __init__(self, rows: list[np.ndarray], preprocessor: Any) -> None:
        self._rows = rows
        self._preprocessor = preprocessor
        self._given = [""] * len(rows)
        self._replacements = _REPLACEMENT
        own = getattr(
            getattr(preprocessor, "tokenizer", None), "replacement_char", None
        )
        if isinstance(own, int):
            # `ByteTokenizer` has a replacement of its own.
            self._replacements += chr(own)

    def first(self) -> list[str]:
        """Returns the text of the tokens before the first piece."""
        return self.add([NO_TOKENS] * len(self._rows), False)

    def add(self, new: list[np.ndarray], finished: bool) -> list[str]:
        """Returns the pieces for new tokens.

        Args:
            new: for each row its new tokens.
            finished: bool. Whether they are the last.

        Returns:
            A string for each row.
        """
        self._rows = [np.concatenate(pair) for pair in zip(self._rows, new)]
        texts = self._texts(finished)
        return [self._piece(row, text, finished) for row, text in enumerate(texts)]

    def _texts(self, finished: bool) -> list[str]:
        try:
            return detokenize(self._rows, self._preprocessor)
        except UnicodeDecodeError:
            # A strict decoder refuses parts of a character; the rest may follow.
            if finished:
                raise
        return [self._text(row, given) for row, given in zip(self._rows, self._given)]

    def _text(self, row: np.ndarray, given: str) -> str:
        try:
            return detokenize([row], self._preprocessor)[0]
        except UnicodeDecodeError:
            return given

    def _piece(self, row: int, text: str, finished: bool) -> str:
        given = self._given[row]
        if not finished:
            text = text.rstrip(self._replacements)
            if not text.startswith(given):
                # The next tokens decide how these are decoded.
                return ""
        self._given[row] = text
        return text[len(given) :]


def stream_pieces(
    blocks: Iterable[Block],
    batch_size: int,
    prompts: list[np.ndarray] | None,
    preprocessor: Any,
    is_single: bool,
) -> Iterator[Any]:
    """Yields text or tokens as they are generated.

    Args:
        blocks: new tokens and which of them are part of the rows.
        batch_size: int. The number of rows.
        prompts: the prompts, if they are yielded first, or `None`.
        preprocessor: has `generate_postprocess`; `None` to yield tokens.
        is_single: bool. Whether there is one row, which is yielded without a list.
    """
    if preprocessor is None:
        found: Iterator[list] = stream_tokens(blocks, prompts)
    else:
        rows = prompts or [NO_TOKENS] * batch_size
        pieces = TextPieces(rows, preprocessor)
        found = stream_text(blocks, prompts, pieces)
    for rows in found:
        yield rows[0] if is_single else rows


def stream_text(
    blocks: Iterable[Block], prompts: list[np.ndarray] | None, pieces: TextPieces
) -> Iterator[list[str]]:
    """Yields a list with a string for each row, as tokens are generated.

    Args:
        blocks: new tokens and which of them are part of the rows.
        prompts: the prompts, if they are part of the text, or `None`.
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
        last = pieces.add([NO_TOKENS] * rows, finished=True)
        if any(last):
            yield last


def stream_tokens(
    blocks: Iterable[Block], prompts: list[np.ndarray] | None
) -> Iterator[list[np.ndarray]]:
    """Yields a list with an array of tokens for each row, as they are generated."""
    if prompts is not None:
        yield prompts
    for tokens, valid in blocks:
        yield [row[mask] for row, mask in zip(tokens, valid)]
