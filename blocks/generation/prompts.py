"""Prompts: from what a user passes to `generate` to checked token arrays."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import numpy as np
from keras import ops

from attention.contract import check_positive_int, describe
from blocks.generation.token_rows import check_tokens
from blocks.preprocessor import end_token_ids


@dataclasses.dataclass
class Prompts:
    """One batch of prompts, and how far each may be continued.

    Attributes:
        token_ids: `int32` array of shape `(batch, longest)`.
        lengths: `int32` array `(batch,)`: the lengths of the prompts.
        limits: `int32` array `(batch,)`: the lengths at which rows end.
        width: int. The length of the arrays that are returned.
        as_text: bool. Whether the user passed text.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    limits: np.ndarray
    width: int
    as_text: bool

    def rows(self) -> list[np.ndarray]:
        """The tokens of each prompt."""
        return [row[:n] for row, n in zip(self.token_ids, self.lengths)]

    def repeat(self, times: int) -> Prompts:
        """The same prompts with `times` rows for each."""
        return Prompts(
            np.repeat(self.token_ids, times, axis=0),
            np.repeat(self.lengths, times),
            np.repeat(self.limits, times),
            self.width,
            self.as_text,
        )


def normalize_inputs(inputs: Any) -> tuple[list[Any], bool]:
    """Splits inputs into batches.

    Args:
        inputs: a string, a list or array of strings, a dict of `token_ids` and
            `padding_mask`, or a `tf.data.Dataset` of batches of either.

    Returns:
        A list of batches (lists of strings, or dicts), and whether the user
        passed one string or one row.

    Raises:
        TypeError: for anything else.
        ValueError: if there is nothing in it.
    """
    if hasattr(inputs, "as_numpy_iterator"):
        batches = [_normalize_batch(x)[0] for x in inputs.as_numpy_iterator()]
        if not batches:
            raise ValueError("`inputs` is a dataset without elements.")
        return batches, False
    batch, is_single = _normalize_batch(inputs)
    return [batch], is_single


def _normalize_batch(inputs: Any) -> tuple[Any, bool]:
    if isinstance(inputs, dict):
        return _normalize_tokens(inputs)
    if isinstance(inputs, (str, bytes)):
        return [_to_str(inputs)], True
    if hasattr(inputs, "shape") and not isinstance(inputs, np.ndarray):
        inputs = np.asarray(inputs)
    if isinstance(inputs, np.ndarray):
        if inputs.ndim == 0:
            return [_to_str(inputs.item())], True
        inputs = inputs.tolist()
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(
            "`inputs` must be a string, a list of strings, a dict of "
            "`token_ids` and `padding_mask`, or a `tf.data.Dataset` of these. "
            f"Received: inputs={describe(inputs)}"
        )
    if not inputs:
        raise ValueError("`inputs` is empty: there is no prompt to continue.")
    return [_to_str(x) for x in inputs], False


def _to_str(text: Any) -> str:
    if hasattr(text, "numpy"):
        text = text.numpy()
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    if not isinstance(text, str):
        raise TypeError(
            "`inputs` must be strings, or a dict of `token_ids` and "
            f"`padding_mask`. Received: {describe(text)}"
        )
    return text


def _normalize_tokens(inputs: dict) -> tuple[dict[str, np.ndarray], bool]:
    missing = {"token_ids", "padding_mask"} - set(inputs)
    if missing:
        raise ValueError(
            "A dict of inputs must have the keys `token_ids` and "
            f"`padding_mask`. Missing: {sorted(missing)}. Received: "
            f"inputs={describe(inputs)}"
        )
    try:
        tokens = ops.convert_to_numpy(inputs["token_ids"])
        mask = ops.convert_to_numpy(inputs["padding_mask"]).astype(bool)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            "`token_ids` and `padding_mask` must be arrays of shape (batch, "
            "length): pad rows of different lengths on the right. Received: "
            f"inputs={describe(inputs)}"
        ) from error
    if tokens.shape != mask.shape or tokens.ndim not in (1, 2):
        raise ValueError(
            "`token_ids` and `padding_mask` must both have the shape (batch, "
            f"length). Received: inputs={describe(inputs)}"
        )
    if tokens.dtype.kind not in "iu":
        raise TypeError(
            f"`token_ids` must be integers. Received: inputs={describe(inputs)}"
        )
    is_single = tokens.ndim == 1
    if is_single:
        tokens, mask = tokens[None], mask[None]
    if not len(tokens):
        raise ValueError("`inputs` is empty: there is no prompt to continue.")
    return {"token_ids": tokens, "padding_mask": mask}, is_single


def read_prompts(
    batch: Any,
    preprocessor: Any,
    max_length: int | None,
    max_new_tokens: int | None,
    vocabulary_size: int | None,
    max_positions: int | None,
) -> Prompts:
    """Tokenizes a batch of prompts, and checks all that can be checked.

    Args:
        batch: a list of strings or a dict of arrays.
        preprocessor: turns strings into tokens, or `None`.
        max_length: int or `None`. The length at which rows end.
        max_new_tokens: int or `None`. How many tokens each row may get.
        vocabulary_size: int or `None`. The number of tokens of the model.
        max_positions: int or `None`. How many positions the model knows.

    Returns:
        A `Prompts`.

    Raises:
        ValueError: if a prompt is empty, too long, not padded on the right or
            holds tokens that the model does not know.
    """
    if max_length is not None:
        check_positive_int("max_length", max_length)
    if max_new_tokens is not None:
        check_positive_int("max_new_tokens", max_new_tokens)
    as_text = not isinstance(batch, dict)
    if as_text:
        if preprocessor is None:
            raise ValueError(
                "`generate` received text, but the model has no `preprocessor` to "
                "turn it into tokens. Pass a dict of `token_ids` and "
                "`padding_mask`, or make the model with a preprocessor."
            )
        default = preprocessor.sequence_length
        given = max_length or (None if max_new_tokens else default)
        tokens, mask = _tokenize(batch, preprocessor, given)
    else:
        tokens, mask = batch["token_ids"], batch["padding_mask"]
        default = tokens.shape[1]
    lengths = mask.sum(axis=1).astype("int32")
    _check_rows(mask, lengths, as_text)
    check_tokens(tokens, lengths, vocabulary_size, as_text)
    longest = int(lengths.max())
    if max_new_tokens is None:
        total = max_length or default
        limits = np.full_like(lengths, total)
    else:
        limits = lengths + np.int32(max_new_tokens)
        total = max_length or int(limits.max())
        limits = np.minimum(limits, total)
    if longest > total:
        row = int(lengths.argmax())
        name = "`max_length`" if max_length else "the preprocessor's `sequence_length`"
        raise ValueError(
            f"Prompt {row} has {longest} tokens{' or more' if as_text else ''}, "
            f"which is more than {name} of {total} (prompt and new tokens "
            "together). Shorten the prompt, or pass a larger `max_length`."
        )
    if max_positions is not None and int(limits.max()) > max_positions:
        raise ValueError(
            f"The model has learned {max_positions} positions, but was asked for "
            f"sequences of {int(limits.max())} tokens (prompt and new tokens "
            "together). Pass a smaller `max_length` or `max_new_tokens`, or make "
            "the backbone with a larger `max_sequence_length`."
        )
    width = total if as_text or max_length else max(total, default)
    # What stands in padded places need not be a token, so it can't be embedded.
    tokens = np.where(mask, tokens, 0)[:, :longest].astype("int32")
    return Prompts(tokens, lengths, limits, width, as_text)


def _tokenize(
    texts: list[str], preprocessor: Any, length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes with room for one token more than `length`, to notice that."""
    whole = length is None
    if length is None:
        # A token stands for about one byte or more, special tokens aside.
        length = max(len(text.encode("utf-8")) for text in texts) + 8
    while True:
        encoded = preprocessor.generate_preprocess(texts, sequence_length=length + 1)
        tokens = ops.convert_to_numpy(encoded["token_ids"])
        mask = ops.convert_to_numpy(encoded["padding_mask"]).astype(bool)
        if not whole or not mask.all(axis=1).any():
            return tokens, mask
        # A tokenizer that normalizes may make more tokens than there were bytes.
        length *= 2


def _check_rows(mask: np.ndarray, lengths: np.ndarray, as_text: bool) -> None:
    if (lengths == 0).any():
        advice = (
            "Prompt with some text, or give the preprocessor a start token."
            if as_text
            else "Each row needs at least one token that `padding_mask` marks as real."
        )
        raise ValueError(f"Prompt {int(lengths.argmin())} has no tokens. {advice}")
    expected = np.arange(mask.shape[1])[None, :] < lengths[:, None]
    if (mask != expected).any():
        row = int((mask != expected).any(axis=1).argmax())
        raise ValueError(
            f"Row {row} of `padding_mask` is not of the form 1, ..., 1, 0, ..., "
            "0. Prompts must be padded on the right."
        )


def resolve_stops(stop_token_ids: Any, preprocessor: Any) -> tuple[int, ...]:
    """The tokens at which rows end.

    Args:
        stop_token_ids: what the user passed: `None`, `"auto"` or token ids.
        preprocessor: the model's, or `None`.

    Returns:
        A tuple of ints; an empty one where no token ends a row.

    Raises:
        TypeError: if `stop_token_ids` is none of these.
        ValueError: if it is `"auto"` and there is no preprocessor to ask, or a number
            is too large for a token id.
    """
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if preprocessor is None:
            raise ValueError(
                'With `stop_token_ids="auto"` rows end at the preprocessor\'s '
                "end token, but the model has no preprocessor. Pass "
                "`stop_token_ids=None` to end at `max_length`, or a tuple "
                "of token ids."
            )
        return end_token_ids(preprocessor)
    try:
        stops = tuple(operator.index(x) for x in stop_token_ids)
    except (TypeError, ValueError):
        raise TypeError(
            '`stop_token_ids` must be None, "auto" or a list of token ids. '
            f"Received: stop_token_ids={describe(stop_token_ids)}"
        ) from None
    if any(abs(x) >= 2**31 for x in stops):
        raise ValueError(
            f"`stop_token_ids` must be 32-bit integers. Received: {max(stops, key=abs)}"
        )
    return stops
