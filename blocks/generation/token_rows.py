"""Rows of tokens: as arrays of one width, and whether a model knows them."""

from __future__ import annotations

from typing import Any

import numpy as np

# What a row gets where it gets nothing.
NO_TOKENS = np.zeros((0,), "int32")


def check_tokens(
    tokens: np.ndarray, lengths: np.ndarray, vocabulary_size: int | None, as_text: bool
) -> None:
    """Says so when a token is not in the model's vocabulary.

    Args:
        tokens: array of shape `(batch, width)`.
        lengths: array of shape `(batch,)`: how many tokens of each row count.
        vocabulary_size: int, or `None` where it is not known.
        as_text: bool. Whether the user passed text.

    Raises:
        ValueError: if so.
    """
    if vocabulary_size is None:
        return
    mask = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
    wrong = mask & ((tokens < 0) | (tokens >= vocabulary_size))
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        column = int(wrong[row].argmax())
        source = " (does the tokenizer belong to this model?)" if as_text else ""
        raise ValueError(
            f"Token {int(tokens[row, column])} at position {column} of prompt "
            f"{row} is outside of the model's vocabulary of {vocabulary_size} "
            f"tokens{source}."
        )


def pad_rows(
    rows: list[np.ndarray], width: int | None = None, fill: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one array, and their lengths.

    Args:
        rows: arrays of tokens.
        width: int or `None`. The width of the array; `None` means that of the
            longest row, and at least 1, as not everybody takes rows of nothing.
        fill: int. What stands behind the ends of rows.

    Returns:
        `int32` arrays of shape `(batch, width)` and `(batch,)`.
    """
    lengths = np.array([len(row) for row in rows], "int32")
    tokens = np.full((len(rows), width or max(1, lengths.max())), fill, "int32")
    for row, content in enumerate(rows):
        tokens[row, : len(content)] = content
    return tokens, lengths


def to_arrays(
    rows: list[np.ndarray], pad_token_id: int, width: int | None = None
) -> dict[str, np.ndarray]:
    """Rows of tokens as `token_ids` and `padding_mask`.

    Args:
        rows: arrays of tokens.
        pad_token_id: int. What rows are padded with.
        width: as for `pad_rows`.

    Returns:
        A dict of arrays of shape `(batch, width)`.
    """
    token_ids, lengths = pad_rows(rows, width, pad_token_id)
    padding_mask = np.arange(token_ids.shape[1])[None] < lengths[:, None]
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def vocabulary_size(task: Any) -> int | None:
    """How many tokens a model knows."""
    return getattr(task.backbone, "vocabulary_size", task.output.shape[-1])


def pad_token_id(preprocessor: Any) -> int:
    """The token that fills up rows."""
    for owner in (preprocessor, getattr(preprocessor, "tokenizer", None)):
        pad = getattr(owner, "pad_token_id", None)
        if pad is not None:
            return int(pad)
    return 0


def join_outputs(
    outputs: list[Any], is_single: bool, pad_token_id: int, num_return_sequences: int
) -> Any:
    """Joins the outputs of batches.

    Args:
        outputs: for each batch a list of strings or a dict of arrays.
        is_single: bool. Whether there is one prompt, so that the batch axis
            goes.
        pad_token_id: int. What fills up short rows.
        num_return_sequences: int. If more than one, they get an axis behind the
            batch axis.

    Returns:
        A list (of lists) of strings, or a dict of arrays.
    """
    several = num_return_sequences > 1
    if isinstance(outputs[0], list):
        texts = [text for batch in outputs for text in batch]
        if several:
            starts = range(0, len(texts), num_return_sequences)
            texts = [texts[i : i + num_return_sequences] for i in starts]
        return texts[0] if is_single else texts
    width = max(batch["token_ids"].shape[1] for batch in outputs)

    def join(key: str) -> np.ndarray:
        fill = pad_token_id if key == "token_ids" else 0
        padded = [
            np.pad(x[key], ((0, 0), (0, width - x[key].shape[1])), constant_values=fill)
            for x in outputs
        ]
        joined = np.concatenate(padded)
        if several:
            joined = joined.reshape(-1, num_return_sequences, width)
        return joined[0] if is_single else joined

    return {key: join(key) for key in ("token_ids", "padding_mask")}
