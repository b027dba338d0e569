"""Outputs of generation: strings, arrays, and pieces of text as it is generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from blocks.generation.prompts import NO_TOKENS, pad_rows, to_str
from blocks.generation.running_batch import Block

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
    texts = preprocessor.generate_postprocess(arrays)
    if hasattr(texts, "numpy"):
        texts = texts.numpy()
    return [to_str(text) for text in texts]


class TextPieces:
    """Turns new tokens of rows into pieces of text.

    A piece is the growth of the text of all tokens so far. Bytes that are not yet a
    character are held back.
    """

    def __init__(self, batch_size: int, preprocessor: Any) -> None:
        self._preprocessor = preprocessor
        self._rows = [NO_TOKENS] * batch_size
        self._given = [""] * batch_size
        self._replacements = _REPLACEMENT
        tokenizer = getattr(preprocessor, "tokenizer", None)
        own = getattr(tokenizer, "replacement_char", None)
        if isinstance(own, int):
            # `ByteTokenizer` has a replacement of its own.
            self._replacements += chr(own)

    def add(self, new: list[np.ndarray], finished: bool = False) -> list[str]:
        """Returns a piece for each row's new tokens, which are the last if `finished`."""
        self._rows = [np.concatenate(pair) for pair in zip(self._rows, new)]
        try:
            texts = detokenize(self._rows, self._preprocessor)
        except UnicodeDecodeError:
            # A strict decoder refuses parts of a character; the rest may follow.
            if finished:
                raise
            texts = [self._text(*pair) for pair in zip(self._rows, self._given)]
        return [self._piece(row, text, finished) for row, text in enumerate(texts)]

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
    prompts: list[np.ndarray],
    preprocessor: Any,
    is_single: bool,
) -> Iterator[Any]:
    """Yields text, or tokens if there is no preprocessor, as they are generated.

    `prompts`, which are yielded first, are empty where only what is new is wanted. A
    single row is yielded without a list.
    """
    found = _new_rows(blocks, prompts)
    if preprocessor is not None:
        found = _texts(found, TextPieces(len(prompts), preprocessor))
    for rows in found:
        yield rows[0] if is_single else rows


def _new_rows(blocks: Iterable[Block], prompts: list[np.ndarray]) -> Iterator[list]:
    if any(map(len, prompts)):
        yield prompts
    for tokens, valid in blocks:
        yield [row[mask] for row, mask in zip(tokens, valid)]


def _texts(found: Iterable[list[np.ndarray]], pieces: TextPieces) -> Iterator[list]:
    rows: list[np.ndarray] = []
    for rows in found:
        texts = pieces.add(rows)
        if any(texts):
            yield texts
    if rows:
        texts = pieces.add([NO_TOKENS] * len(rows), finished=True)
        if any(texts):
            yield texts
