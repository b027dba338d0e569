"""Prompts: reads the inputs of `generate` into checked arrays of tokens."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from attention.contract import check_positive_int, describe
from blocks.generation.token_rows import (
    check_tokens,
    cut_rows,
    read_tokens,
    vocabulary_size,
)


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
        """Returns the tokens of each prompt."""
        return cut_rows(self.token_ids, self.lengths)

    def repeat(self, times: int) -> Prompts:
        """Returns the same prompts with `times` rows for each."""
        return Prompts(
            np.repeat(self.token_ids, times, axis=0),
            np.repeat(self.lengths, times),
            np.repeat(self.limits, times),
            self.width,
            self.as_text,
        )


@dataclasses.dataclass
class Batch:
    """A batch of prompts as the user passed it.

    Attributes:
        texts: list of strings, or `None` where tokens were passed.
        token_ids: integers of shape `(batch, width)`, where tokens were passed.
        lengths: `int32` array `(batch,)`: how many of them are real.
        has_mask: bool. Whether there was a `padding_mask`, so that the width of the
            arrays is a default for the length.
    """

    texts: list[str] | None = None
    token_ids: Any = None
    lengths: Any = None
    has_mask: bool = False


def read_batches(inputs: Any) -> tuple[list[Batch], bool]:
    """Reads the inputs of `generate`.

    Args:
        inputs: text (a string; strings in a list, an array, a tensor, a pandas Series
            or a generator), tokens (`token_ids` as for `read_tokens`, alone or in a
            dict with `padding_mask`), or a `tf.data.Dataset` of batches of either.

    Returns:
        A list of batches, and whether there was one string or row without a batch axis.

    Raises:
        TypeError: if it is none of these.
        ValueError: if there is nothing in it.
    """
    if hasattr(inputs, "as_numpy_iterator"):
        batches = [_read_batch(x)[0] for x in inputs.as_numpy_iterator()]
        if not batches:
            raise ValueError("`inputs` is a dataset without elements.")
        return batches, False
    batch, is_single = _read_batch(inputs)
    return [batch], is_single


def _read_batch(inputs: Any) -> tuple[Batch, bool]:
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
    """Returns the string that `is_text`, or raises a `TypeError`."""
    if hasattr(text, "numpy"):
        text = text.numpy()
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    if not isinstance(text, str):
        raise TypeError(
            "Inputs must be all text or all token ids. Received among strings: "
            f"{describe(text)}"
        )
    return text


def read_prompts(
    batch: Batch,
    task: Any,
    max_length: int | None,
    max_new_tokens: int | None,
    max_positions: int | None,
) -> Prompts:
    """Tokenizes a batch of prompts and checks it.

    Args:
        batch: a `Batch`.
        task: the `CausalLM`.
        max_length: int or `None`. The length at which rows end.
        max_new_tokens: int or `None`. How many tokens each row may get.
        max_positions: int or `None`. How many positions the model knows.

    Returns:
        A `Prompts`.

    Raises:
        ValueError: if a prompt is empty, too long, or holds tokens that the model does
            not know.
    """
    if max_length is not None:
        check_positive_int("max_length", max_length)
    if max_new_tokens is not None:
        check_positive_int("max_new_tokens", max_new_tokens)
    texts = batch.texts
    as_text = texts is not None
    if texts is not None:
        preprocessor = task.preprocessor
        if preprocessor is None:
            raise ValueError(
                "`inputs` is text, but the model has no `preprocessor` to turn it into "
                "tokens. Pass token ids, or make the model with a preprocessor."
            )
        default = preprocessor.sequence_length
        given = max_length or (None if max_new_tokens else default)
        tokens, lengths = _tokenize(texts, preprocessor, given)
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
    longest = int(lengths.max())
    if max_new_tokens is None:
        total = max_length or default or longest
        limits = np.full_like(lengths, total) if max_length or default else lengths
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
    return Prompts(tokens[:, :longest].astype("int32"), lengths, limits, width, as_text)


def _tokenize(
    texts: list[str], preprocessor: Any, length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes up to one token more than `length`, to notice longer prompts."""
    whole = length is None
    if length is None:
        # A token is about one byte or more, besides special tokens.
        length = max(len(text.encode("utf-8")) for text in texts) + 8
    while True:
        encoded = preprocessor.generate_preprocess(texts, sequence_length=length + 1)
        tokens, lengths, _ = read_tokens(encoded["token_ids"], encoded["padding_mask"])
        if not whole or lengths.max() < tokens.shape[1]:
            return tokens, lengths
        # A tokenizer that normalizes may make more tokens than there were bytes.
        length *= 2


def resolve_stops(stop_token_ids: Any, task: Any) -> tuple[int, ...]:
    """Returns the tokens at which rows end.

    Args:
        stop_token_ids: `None`, `"auto"`, a token id or several.
        task: the `CausalLM`, whose preprocessor has the end token.

    Returns:
        A tuple of ints; an empty one where no token ends a row.

    Raises:
        TypeError: if `stop_token_ids` is none of these.
        ValueError: if it is `"auto"` and there is no preprocessor to ask, or an id is
            outside of the model's vocabulary.
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
        return _end_token_ids(task.preprocessor)
    several = hasattr(stop_token_ids, "__iter__")
    try:
        stops = tuple(
            map(operator.index, stop_token_ids if several else [stop_token_ids])
        )
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


def _end_token_ids(preprocessor: Any) -> tuple[int, ...]:
    """Returns the end tokens of our preprocessors, or of KerasHub's tokenizers."""
    tokenizer = getattr(preprocessor, "tokenizer", None)
    end = getattr(preprocessor, "end_token_id", None)
    ids = [end]
    if getattr(preprocessor, "end_token", None) is None:
        # Llama 3 has two: of a message and of a text.
        ids += [getattr(tokenizer, f"end_token{i}_id", None) for i in ("", "2")]
    found = tuple(dict.fromkeys(int(x) for x in ids if x is not None))
    if not found:
        warnings.warn(
            "The preprocessor has no end token, so rows end at `max_length` or "
            "`max_new_tokens` only. Pass `stop_token_ids=None` to say so.",
            stacklevel=4,
        )
    return found
