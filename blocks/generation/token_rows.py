"""Rows of tokens: read from the forms that users pass, checked, padded, joined."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from attention.contract import Mask, Tensor, describe

# The new tokens of a row that gets none.
NO_TOKENS = np.zeros((0,), "int32")


def read_tokens(
    token_ids: Tensor, padding_mask: Mask | None = None, name: str = "token_ids"
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Reads rows of tokens in any of the forms that users pass.

    Args:
        token_ids: integers of shape `(batch, length)`, or `(length,)` for one row: an
            array, a tensor or lists; rows of different lengths as lists or as a
            `tf.RaggedTensor`.
        padding_mask: of the shape of `token_ids`, or `None` where all tokens are real.
        name: str. The name of `token_ids` in error messages.

    Returns:
        `(tokens, lengths, is_single)`: integers of shape `(batch, width)`, 0 for
        padding; the lengths of the rows, of shape `(batch,)`; and whether there was one
        row without a batch axis.

    Raises:
        TypeError: if the tokens are not integers.
        ValueError: if there is no token, a shape is wrong, or a row is not padded on
            the right.
    """
    tokens, lengths = _to_array(name, token_ids)
    received = f"Received: {name}={describe(token_ids)}"
    if tokens.size and tokens.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be token ids (integers) or text. {received}")
    if padding_mask is not None:
        mask = _to_array("padding_mask", padding_mask)[0].astype(bool)
        if mask.shape != tokens.shape:
            raise ValueError(
                "`token_ids` and `padding_mask` must both have the shape (batch, "
                f"length). {received}, padding_mask={describe(padding_mask)}"
            )
        lengths = mask.sum(axis=-1)
    is_single = tokens.ndim == 1
    if is_single:
        tokens, lengths = tokens[None], lengths[None]
    if not len(tokens):
        raise ValueError(f"`{name}` is empty: there is no row of tokens.")
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    if padding_mask is not None and (mask != real).any():
        row = int((mask != real).any(axis=-1).argmax())
        raise ValueError(
            f"Row {row} of `padding_mask` is not of the form 1, ..., 1, 0, ..., 0. Rows "
            "must be padded on the right."
        )
    # Padding need not be a valid token, so it is replaced.
    return np.where(real, tokens, 0), lengths.astype("int32"), is_single


def _to_array(name: str, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows as one array, padded with 0, and the lengths of the rows."""
    if hasattr(rows, "to_list"):
        rows = rows.to_list()  # of a `tf.RaggedTensor`
    try:
        if isinstance(rows, (list, tuple)):
            rows = [ops.convert_to_numpy(row) for row in rows]
            if rows and all(row.ndim == 1 for row in rows):
                return pad_rows(rows)
        array = np.array(rows) if isinstance(rows, list) else ops.convert_to_numpy(rows)
        if array.ndim in (1, 2):
            return array, np.full(array.shape[:-1], array.shape[-1])
    except (ValueError, TypeError, AttributeError):
        pass
    raise ValueError(
        f"`{name}` must have the shape (batch, length), or (length,) for one row, or be "
        f"a list of rows. Received: {name}={describe(rows)}"
    )


def check_tokens(
    tokens: np.ndarray, vocabulary_size: int | None, remark: str = ""
) -> None:
    """Checks that all tokens are in the model's vocabulary.

    Args:
        tokens: array of shape `(batch, width)`, 0 for padding.
        vocabulary_size: int, or `None` where it is not known.
        remark: str. An addition to the error message.

    Raises:
        ValueError: if a token is not.
    """
    if vocabulary_size is None:
        return
    wrong = (tokens < 0) | (tokens >= vocabulary_size)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"Token {int(tokens[row, column])} at position {column} of row {row} is "
            f"outside of the model's vocabulary of {vocabulary_size} tokens{remark}."
        )


def pad_rows(
    rows: list[np.ndarray], width: int | None = None, fill: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of different lengths to one array.

    Args:
        rows: arrays of tokens.
        width: int or `None`. The width of the array; `None` means the length of the
            longest row, at least 1, as some detokenizers take no empty rows.
        fill: int. The token after the ends of rows.

    Returns:
        An array of shape `(batch, width)`, and the lengths of the rows, `(batch,)`.
    """
    lengths = np.array([len(row) for row in rows], "int32")
    # An empty list is an array of floats.
    tokens = np.concatenate([NO_TOKENS, *(row for row in rows if len(row))])
    real = np.arange(width or max(1, lengths.max())) < lengths[:, None]
    padded = np.full(real.shape, fill, tokens.dtype)
    padded[real] = tokens
    return padded, lengths


def cut_rows(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Returns the rows of an array that `pad_rows` has made."""
    return [row[:n] for row, n in zip(tokens, lengths)]


def to_arrays(
    rows: list[np.ndarray], pad_token_id: int, width: int | None = None
) -> dict[str, np.ndarray]:
    """Returns rows of tokens as `token_ids` and `padding_mask`.

    Args:
        rows: arrays of tokens.
        pad_token_id: int. The token of padding.
        width: as for `pad_rows`.

    Returns:
        A dict of arrays of shape `(batch, width)`.
    """
    token_ids, lengths = pad_rows(rows, width, pad_token_id)
    padding_mask = np.arange(token_ids.shape[1])[None] < lengths[:, None]
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def vocabulary_size(task: Any) -> int | None:
    """Returns the number of tokens that a model knows, or `None`."""
    return getattr(task.backbone, "vocabulary_size", task.output.shape[-1])


def tokenizer_size(preprocessor: Any) -> int | None:
    """Returns how many tokens a preprocessor's tokenizer has, or `None` if unknown."""
    try:
        return preprocessor.tokenizer.vocabulary_size()
    except Exception:
        # There is none, or it is being restored and its vocabulary follows.
        return None


def pad_token_id(preprocessor: Any) -> int:
    """Returns the token of padding."""
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
        is_single: bool. Whether there is one prompt, so that the batch axis is
            removed.
        pad_token_id: int. The token of padding.
        num_return_sequences: int. If more than one, they get an axis after the
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
