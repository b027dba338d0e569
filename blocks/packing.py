"""Packs documents into rows without waste, for training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attention.contract import check_positive_int, describe
from blocks.conversations import is_conversations, read_conversations, tokenized
from blocks.generation.prompts import is_text, to_plain, to_str
from blocks.preprocessor import CausalLMPreprocessor
from blocks.training_data import as_dataset, read_answers

# So many documents are given to the tokenizer at a time.
_AT_A_TIME = 256


class _Piece(NamedTuple):
    """Tokens of a document, the next one of each, and the weight of that in the loss."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class PackedDocuments:
    """Batches of rows in which short documents stand one after the other.

    Rows of one document each are mostly padding where documents are short. `fit`
    trains on these batches as if each document had its own row, for every attention
    and recurrent layer: see `attention.SegmentScope`. A document is put into the
    fullest row that has room for it; only one longer than a row is cut, and then no
    target is lost. No token is trained to predict the start of another document.

    It is read anew in each epoch, and always gives the same batches for the same
    documents. An iterator of documents is read once, in one epoch of `fit`, or, with
    `steps_per_epoch`, in several.

    Args:
        documents: an iterable of strings, or of lists of token ids; a
            `tf.data.Dataset` of strings; or a dict of `prompts` and `responses`, or of
            `messages`, of which only what `CausalLM.fit` learns are targets.
        preprocessor: `None`, or a `blocks.CausalLMPreprocessor`, whose tokenizer reads
            strings, and which has the tokens before and after them. Lists of token
            ids are taken as they are.
        sequence_length: int or `None`. The length of rows; `None` means the
            preprocessor's.
        batch_size: int. How many rows a batch has.
        open_rows: int. How many rows are filled at a time. More leave less padding,
            and move documents further from their order.
        drop_remainder: bool. Whether to leave out the last rows, which are too few
            for a batch.

    Iterating yields tuples `(x, y, sample_weight)` of arrays: `x` is a dict of
    `token_ids`, `padding_mask`, `segment_ids` (0 for padding, and in each row 1, 2 and
    so on for its documents) and `positions` (of each token in its document), and each
    array is of shape `(batch_size, sequence_length)`.

    Raises:
        TypeError: if a document is neither text nor token ids.
        ValueError: if there is text but no preprocessor, or no `sequence_length`.

    Example:

    >>> from blocks import PackedDocuments
    >>> documents = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    >>> data = PackedDocuments(documents, sequence_length=6, batch_size=1)
    >>> x, y, sample_weight = next(iter(data))
    >>> x["token_ids"].tolist(), y.tolist()
    ([[1, 2, 3, 5, 7, 8]], [[2, 3, 4, 6, 8, 9]])
    >>> x["segment_ids"].tolist(), x["positions"].tolist()
    ([[1, 1, 1, 2, 3, 3]], [[0, 1, 2, 0, 0, 1]])

    Reference:

    - [Ding et al., 2024](https://arxiv.org/abs/2404.10830)
    """

    def __init__(
        self,
        documents: Any,
        preprocessor: CausalLMPreprocessor | None = None,
        sequence_length: int | None = None,
        batch_size: int = 32,
        open_rows: int = 64,
        drop_remainder: bool = False,
    ) -> None:
        if isinstance(documents, str) or not isinstance(documents, Iterable):
            raise TypeError(
                "`documents` must be an iterable of strings or of lists of token ids. "
                f"Received: documents={describe(documents)}"
            )
        if sequence_length is None and preprocessor is None:
            raise ValueError(
                "`sequence_length`, the length of rows, is needed where there is no "
                "`preprocessor`."
            )
        if isinstance(documents, dict) and is_conversations(documents):
            if preprocessor is None:
                raise ValueError("Conversations need a `preprocessor`.")
            documents = {"messages": read_conversations(documents, "documents")}
        elif isinstance(documents, dict):
            documents = read_answers(documents, "documents")
        self.documents = documents
        self.preprocessor: Any = preprocessor
        length = sequence_length or getattr(preprocessor, "sequence_length", None)
        self.sequence_length = check_positive_int("sequence_length", length)
        self.batch_size = check_positive_int("batch_size", batch_size)
        self.open_rows = check_positive_int("open_rows", open_rows)
        self.drop_remainder = drop_remainder

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Any, Any]]:
        rows = self._rows(self._pieces())
        while batch := list(itertools.islice(rows, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_remainder:
                yield self._to_arrays(batch)

    def as_dataset(self) -> tf.data.Dataset:
        """Returns a `tf.data.Dataset` of the same batches.

        Raises:
            ValueError: if the documents are an iterator: a dataset is read several times,
                also by Keras before the first epoch.
        """
        if isinstance(self.documents, Iterator):
            raise ValueError(
                "`documents` can be read only once, and a dataset is read several times. "
                "Pass a list, or the `PackedDocuments` themselves to `fit`. Received: "
                f"documents={describe(self.documents)}"
            )
        return as_dataset(self)

    def _pieces(self) -> Iterator[_Piece]:
        for tokens, weights in self._tokenized():
            # Each token but the last has a target, in the same document.
            piece = _Piece(tokens[:-1], tokens[1:], weights[1:])
            for start in range(0, len(piece.tokens), self.sequence_length):
                end = start + self.sequence_length
                yield _Piece(*(x[start:end] for x in piece))

    def _tokenized(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Returns the tokens of each document, and their weights as targets."""
        if is_conversations(self.documents):
            for tokens, learned in tokenized(
                self.preprocessor, self.documents["messages"]
            ):
                yield tokens, learned.astype("float32")
            return
        documents = self._documents()
        while some := list(itertools.islice(documents, _AT_A_TIME)):
            texts = [to_str(x) for parts in some for x in parts if is_text(x)]
            encoded = iter(self._tokenize(texts))
            for parts in some:
                if not is_text(parts[-1]):
                    tokens = np.asarray(parts[-1])
                    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                        raise TypeError(
                            "`documents` must be strings or lists of token ids. "
                            f"Received: {describe(parts[-1])}"
                        )
                    yield tokens.astype("int32"), np.ones(len(tokens), "float32")
                    continue
                *prompt, text = (next(encoded) for _ in parts)
                tokens = self._with_ends([*itertools.chain(*prompt, text)])
                weights = np.ones(len(tokens), "float32")
                # The first token is no target, in no document.
                weights[: len(tokens) - len(text) - self._ends] = 0.0
                yield tokens, weights

    def _documents(self) -> Iterator[tuple]:
        """Returns a tuple for each document: a prompt, if there is one, and the rest."""
        documents = self.documents
        if isinstance(documents, dict):
            return zip(*documents.values())
        if isinstance(documents, tf.data.Dataset):
            documents = documents.as_numpy_iterator()
        return zip(to_plain(documents))

    @property
    def _ends(self) -> int:
        """How many tokens are put after a text."""
        given = self.preprocessor
        return int(given.add_end_token and given.end_token_id is not None)

    def _with_ends(self, tokens: list[int]) -> np.ndarray:
        """Returns tokens with those that the preprocessor puts before and after them."""
        start, end = self.preprocessor.start_token_id, self.preprocessor.end_token_id
        begins = start is None or tokens[:1] == [start]
        if self.preprocessor.add_start_token and not begins:
            tokens = [start, *tokens]
        return np.asarray(tokens + [end] * self._ends, "int32")

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.preprocessor is None:
            raise ValueError(
                "`documents` has text, so a `preprocessor` is needed. Received: "
                f"documents={describe(texts[:2])}"
            )
        return [[*map(int, row)] for row in self.preprocessor.tokenizer(texts)]

    def _rows(self, pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
        """Puts each piece into the fullest open row that has room for it."""
        rows: list[list[_Piece]] = []
        room: list[int] = []

        def close(row: int) -> list[_Piece]:
            del room[row]
            return rows.pop(row)

        for piece in pieces:
            size = len(piece.tokens)
            fitting = [i for i, left in enumerate(room) if left >= size]
            if fitting:
                row = min(fitting, key=room.__getitem__)
            else:
                if len(rows) == self.open_rows:
                    yield close(min(range(len(room)), key=room.__getitem__))
                rows.append([])
                room.append(self.sequence_length)
                row = len(rows) - 1
            rows[row].append(piece)
            room[row] -= size
            if room[row] == 0:
                yield close(row)
        yield from rows

    def _to_arrays(self, rows: list[list[_Piece]]) -> tuple[dict[str, Any], Any, Any]:
        pad = 0 if self.preprocessor is None else self.preprocessor.pad_token_id
        shape = (len(rows), self.sequence_length)
        tokens, targets = np.full(shape, pad, "int32"), np.full(shape, pad, "int32")
        segments, positions = np.zeros(shape, "int32"), np.zeros(shape, "int32")
        weights = np.zeros(shape, "float32")
        for i, row in enumerate(rows):
            start = 0
            for number, piece in enumerate(row, 1):
                size = len(piece.tokens)
                place = slice(start, start + size)
                tokens[i, place], targets[i, place], weights[i, place] = piece
                segments[i, place], positions[i, place] = number, np.arange(size)
                start += size
        x = {
            "token_ids": tokens,
            "padding_mask": (segments > 0).astype("int32"),
            "segment_ids": segments,
            "positions": positions,
        }
        return x, targets, weights
