"""Prompts: reads the inputs of `generate` into checked arrays of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from attention.contract import Mask, Tensor, check_optional_positive_int, describe

# The new tokens of a row that gets none.
NO_TOKENS = np.zeros((0,), "int32")


class Prompts(NamedTuple):
    """One batch of prompts, and how far each may be continued.

    Attributes:
        token_ids: `int32` array of shape `(batch, longest)`.
        lengths: `int32` array `(batch,)`: the lengths of the prompts.
        limits: `int32` array `(batch,)`: the lengths at which rows end.
        width: int. The length of the arrays that are returned.
        as_text: bool. Whether the user passed text.
        sources: what an encoder reads, or what is beside the tokens, by name: arrays with
            a row for each prompt; or `None`.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    limits: np.ndarray
    width: int
    as_text: bool
    sources: Any = None

    def rows(self, times: int = 1) -> list[np.ndarray]:
        """Returns the tokens of each prompt, `times` rows for each."""
        rows = cut_rows(self.token_ids, self.lengths)
        return [row for row in rows for _ in range(times)]


class Batch(NamedTuple):
    """A batch of prompts as the user passed it: texts, or rows of tokens.

    With a `padding_mask` the width of `token_ids` is a default for the length.
    """

    texts: list[str] | None
    token_ids: Any = None
    lengths: Any = None
    has_mask: bool = False
    sources: Any = None


def read_batches(
    inputs: Any, split: Callable[[Any], tuple[Any, Any]] | None = None
) -> tuple[list[Batch], bool]:
    """Reads the inputs of `generate`, in any of the forms that users pass.

    These are text (a string; strings in a list, an array, a tensor, a pandas Series or
    a generator), tokens (`token_ids` as for `read_tokens`, alone or in a dict with
    `padding_mask`), or a `tf.data.Dataset` of batches of either. `split(inputs)` returns
    the sources of a batch, and its prompts in one of these forms.

    Returns:
        A list of batches, and whether there was one string or row without a batch axis.
    """

    def read(inputs: Any) -> tuple[Batch, bool]:
        if split is None:
            return _read_prompts(inputs)
        sources, inputs = split(inputs)
        batch, is_single = _read_prompts(inputs)
        rows = len(batch.lengths if batch.texts is None else batch.texts)
        counts = {name: len(x) for name, x in (sources or {}).items()}
        if set(counts.values()) - {rows}:
            raise ValueError(
                f"There must be a source for each of the {rows} prompts. Received rows: "
                f"{counts}"
            )
        return Batch(*batch[:4], sources), is_single

    if hasattr(inputs, "as_numpy_iterator"):
        batches = [read(x)[0] for x in inputs.as_numpy_iterator()]
        if not batches:
            raise ValueError("`inputs` is a dataset without elements.")
        return batches, False
    batch, is_single = read(inputs)
    return [batch], is_single


def _read_prompts(inputs: Any) -> tuple[Batch, bool]:
    if isinstance(inputs, dict):
        if "token_ids" not in inputs:
            raise ValueError(
                "A dict of inputs must have the key `token_ids`, and may have "
                f"`padding_mask`. Received: inputs={describe(inputs)}"
            )
        mask = inputs.get("padding_mask")
        tokens, lengths, is_single = read_tokens(inputs["token_ids"], mask)
        return Batch(None, tokens, lengths, mask is not None), is_single
    inputs = list(inputs) if isinstance(inputs, Iterator) else to_plain(inputs)
    if is_text(inputs):
        return Batch([to_str(inputs)]), True
    if not hasattr(inputs, "__len__"):
        raise TypeError(
            "`inputs` must be a string, a list of strings, token ids (a list or array of "
            "integers, or a dict of `token_ids` and `padding_mask`), or a "
            f"`tf.data.Dataset` of these. Received: inputs={describe(inputs)}"
        )
    if not len(inputs):
        raise ValueError("`inputs` is empty: there is no prompt to continue.")
    if isinstance(inputs, (list, tuple)) and is_text(inputs[0]):
        return Batch([to_str(x) for x in inputs]), False
    tokens, lengths, is_single = read_tokens(inputs, name="inputs")
    return Batch(None, tokens, lengths), is_single


def to_plain(inputs: Any) -> Any:
    """Returns text of any kind as a string or a list, and all else as it is."""
    if hasattr(inputs, "to_list"):
        return inputs.to_list()  # of a pandas Series or a `tf.RaggedTensor`
    if "int" not in str(getattr(inputs, "dtype", "int")):
        return np.asarray(inputs).tolist()  # an array of strings
    return inputs


def is_text(x: Any) -> bool:
    """Returns whether something is a string, bytes, or a tensor of TensorFlow's."""
    return isinstance(x, (str, bytes)) or "string" in str(getattr(x, "dtype", ""))


def to_str(text: Any) -> str:
    """Returns the string that `is_text`.

    Raises:
        TypeError: if it is none.
        ValueError: if it has half a surrogate pair, as JSON may: no tokenizer reads it.
    """
    if hasattr(text, "numpy"):
        text = text.numpy()
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    if not isinstance(text, str):
        raise TypeError(
            "Inputs must be all text or all token ids. Received among strings: "
            f"{describe(text)}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            "Text must be what UTF-8 can encode. Received half a surrogate pair, "
            f"{text[error.start]!r}, as character {error.start} of a string of "
            f"{len(text)}. Remove it, or pair it."
        ) from None
    return text


def one_text(texts: Any) -> str:
    """Returns the string of a text, or of the only one of a batch, of any kind."""
    texts = to_plain(texts)
    return to_str(texts if is_text(texts) else texts[0])


def row_limits(
    lengths: np.ndarray,
    max_length: int | None,
    max_new_tokens: int | None,
    default: int,
    max_positions: int | None,
) -> np.ndarray:
    """Returns the lengths at which rows of these lengths end, `(batch,)`.

    `default` is the `max_length` where neither length was passed; 0 means none.
    """
    if max_new_tokens is not None:
        limits = lengths + np.int32(max_new_tokens)
        limits = np.minimum(limits, max_length or limits)
    elif max_length or default:
        limits = np.full_like(lengths, max_length or default)
    else:
        limits = lengths
    if max_positions is not None and int(limits.max()) > max_positions:
        raise ValueError(
            f"The model has learned {max_positions} positions, but was asked for "
            f"sequences of {int(limits.max())} tokens (prompt and new tokens together). "
            "Pass a smaller `max_length` or `max_new_tokens`, `trim` the session if it is "
            "one, or make the backbone with a larger `max_sequence_length`."
        )
    return limits


def read_prompts(
    batch: Batch,
    task: Any,
    max_length: int | None,
    max_new_tokens: int | None,
    max_positions: int | None,
) -> Prompts:
    """Returns a batch of prompts as tokens, checked."""
    check_optional_positive_int("max_length", max_length)
    check_optional_positive_int("max_new_tokens", max_new_tokens)
    as_text = batch.texts is not None
    if batch.texts is not None:
        preprocessor = task.preprocessor
        if preprocessor is None:
            raise ValueError(
                "`inputs` is text, but the model has no `preprocessor` to turn it into "
                "tokens. Pass token ids, or make the model with a preprocessor."
            )
        default = preprocessor.sequence_length
        given = max_length or (None if max_new_tokens else default)
        tokens, lengths = _tokenize(batch.texts, task.preprocess_prompts, given)
    else:
        tokens, lengths = batch.token_ids, batch.lengths
        # Without a `padding_mask` the width of the arrays is no default.
        default = tokens.shape[1] if batch.has_mask else 0
    check_tokens(tokens, vocabulary_size(task))
    if (lengths == 0).any():
        advice = (
            "Prompt with some text, or give the preprocessor a start token."
            if as_text
            else "Each row needs at least one token that `padding_mask` marks as real."
        )
        raise ValueError(f"Prompt {int(lengths.argmin())} has no tokens. {advice}")
    limits = row_limits(lengths, max_length, max_new_tokens, default, max_positions)
    longest = int(lengths.max())
    if longest > limits[lengths.argmax()]:
        name = "`max_length`" if max_length else "the preprocessor's `sequence_length`"
        raise ValueError(
            f"Prompt {lengths.argmax()} has {longest} tokens"
            f"{' or more' if as_text else ''}, which is more than {name} of "
            f"{max_length or default} (prompt and new tokens together). Shorten the "
            "prompt, or pass a larger `max_length`."
        )
    width = max_length or max(int(limits.max()), 0 if as_text else default)
    tokens = tokens[:, :longest].astype("int32")
    return Prompts(tokens, lengths, limits, width, as_text, batch.sources)


def _tokenize(
    texts: list[str], preprocess: Callable[[list[str], int], Any], length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes up to one token more than `length`, to notice longer prompts."""
    whole = length is None
    if length is None:
        # A token is about one byte or more, besides special tokens.
        length = max(len(text.encode("utf-8")) for text in texts) + 8
    while True:
        encoded = preprocess(texts, length + 1)
        tokens, lengths, _ = read_tokens(encoded["token_ids"], encoded["padding_mask"])
        if not whole or lengths.max() < tokens.shape[1]:
            return tokens, lengths
        # A tokenizer that normalizes may make more tokens than there were bytes.
        length *= 2


# === Rows of tokens ===


def read_tokens(
    token_ids: Tensor, padding_mask: Mask | None = None, name: str = "token_ids"
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Reads rows of tokens: an array, a tensor or lists of integers, one row or several.

    Rows of different lengths may be lists or a `tf.RaggedTensor`.

    Returns:
        `(tokens, lengths, is_single)`: integers of shape `(batch, width)`, 0 for
        padding; the lengths of the rows, of shape `(batch,)`; and whether there was one
        row without a batch axis.
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
    """Raises a `ValueError` if a token, of an array `(batch, width)`, is not known."""
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
    """Returns rows as one array of shape `(batch, width)`, and their lengths, `(batch,)`.

    `width` is by default the length of the longest row, but at least 1, as some
    detokenizers take no empty rows.
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


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """Returns how many tokens two rows have in common at their beginnings."""
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if len(differ) else size


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
