"""Answers that keep to a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from attention.contract import Tensor, describe
from blocks.generation.endings import end_token_ids
from blocks.generation.processors import HostProcessor, TokensSoFar

# What is made of a tokenizer takes a second.
_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
# 32 bits of a mask: all tokens are allowed.
ANY_TOKEN = -1


class GrammarMask(HostProcessor):
    """Leaves each row the tokens that its grammar allows next.

    Args:
        grammars: for each row a grammar as `read_grammar` returns it, or `None` for any
            text.
        task: the `blocks.CausalLM`.

    Reference:

    - [llguidance](https://github.com/guidance-ai/llguidance)
    """

    def __init__(self, grammars: Sequence[str | None], task: Any) -> None:
        import llguidance

        tokenizer = _tokenizer_of(task)
        self.words = -(-tokenizer.vocab_size // 32)
        self._matchers = [
            None if x is None else llguidance.LLMatcher(tokenizer, x, log_level=0)
            for x in grammars
        ]

    def create_state(self, tokens: TokensSoFar) -> Any:
        return self.next_state()

    def take(self, new: list[np.ndarray]) -> np.ndarray:
        for row, (matcher, tokens) in enumerate(zip(self._matchers, new)):
            if matcher is None or not len(tokens) or matcher.is_stopped():
                continue
            matcher.consume_tokens(tokens.tolist())
            if matcher.is_error():
                raise ValueError(
                    f"The grammar of row {row} can't go on: {matcher.get_error()}"
                )
        return np.array([x is not None and x.is_stopped() for x in self._matchers])

    def next_state(self) -> np.ndarray:
        """Returns which tokens are allowed, `(rows, words)`, a bit for each."""
        mask = np.full((len(self._matchers), self.words), ANY_TOKEN, "int32")
        for row, matcher in zip(mask, self._matchers):
            if matcher is not None and not matcher.is_stopped():
                matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        return mask

    def look_ahead(
        self, guesses: list[np.ndarray], width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        masks = np.full((width, len(guesses), self.words), ANY_TOKEN, "int32")
        masks[0] = self.next_state()
        counts = np.array(list(map(len, guesses)), "int32")
        for row, (matcher, tokens) in enumerate(zip(self._matchers, guesses)):
            if matcher is not None and not matcher.is_stopped():
                counts[row] = _look_ahead(matcher, tokens.tolist(), masks[1:, row])
        return masks, counts

    def call(
        self, logits: Tensor, tokens: TokensSoFar, state: Any
    ) -> tuple[Tensor, Any]:
        rows, size = logits.shape
        bits = ops.arange(32, dtype="int32")
        allowed = ops.bitwise_and(ops.right_shift(state[:, :, None], bits), 1) > 0
        allowed = ops.reshape(allowed, (rows, -1))[:, :size]
        lacking = size - allowed.shape[1]
        allowed = ops.pad(allowed, ((0, 0), (0, max(lacking, 0))))
        return ops.where(allowed, logits, -math.inf), state

    def fixed(self) -> Any:
        return type(self), self.words


def _look_ahead(matcher: Any, guesses: list[int], masks: np.ndarray) -> int:
    """Writes the mask after each guess; returns how many are allowed, and not the last.

    The matcher is then as before.
    """
    count = taken = 0
    for token, mask in zip(guesses, masks):
        if not matcher.validate_tokens([token]):
            break
        matcher.consume_token(token)
        taken += 1
        if matcher.is_stopped():
            break
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        count += 1
    matcher.rollback(taken)
    return count


def read_grammar(value: Any, task: Any) -> str | None:
    """Returns one row's grammar as llguidance has it, checked; `None` for none.

    Raises:
        ImportError: if llguidance is not installed.
        TypeError: if it is none of the three kinds.
        ValueError: if it is not valid, or the model has no tokenizer or no end token.
    """
    if value is None:
        return None
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise ImportError(
            'Grammars need the package llguidance: `pip install ".[grammar]"`.'
        ) from error
    if isinstance(value, dict):
        # Else a model that was not trained to may go on with spaces forever.
        plain: Any = {"whitespace_flexible": False}
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(value), plain)
    elif isinstance(value, re.Pattern):
        grammar = LLMatcher.grammar_from_regex(value.pattern)
    elif isinstance(value, str):
        grammar = LLMatcher.grammar_from_lark(value)
    else:
        raise TypeError(
            "`grammar` must be a dict (a JSON schema), an `re.Pattern`, or a string (a "
            f"Lark grammar). Received: grammar={describe(value)}"
        )
    problem = LLMatcher.validate_grammar(grammar, _tokenizer_of(task))
    if problem:
        raise ValueError(f"`grammar` is not valid: {problem}")
    return grammar


def _tokenizer_of(task: Any) -> Any:
    """Returns what llguidance knows of a model's tokenizer."""
    tokenizer = getattr(task.preprocessor, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "`grammar` is about text, but the model has no `preprocessor` with a "
            "tokenizer."
        )
    if tokenizer not in _tokenizers:
        _tokenizers[tokenizer] = _make_tokenizer(tokenizer, task)
    return _tokenizers[tokenizer]


def _make_tokenizer(tokenizer: Any, task: Any) -> Any:
    import llguidance

    preprocessor = task.preprocessor
    ends = getattr(preprocessor, "stop_token_ids", None) or end_token_ids(preprocessor)
    if not ends:
        raise ValueError(
            "`grammar` needs an end token, which says that an answer is complete. Make "
            "the preprocessor with one."
        )
    backend: Any = getattr(tokenizer, "backend", None)
    if hasattr(backend, "to_str"):
        return llguidance.LLTokenizer(backend.to_str(), eos_token=list(ends))
    wrapped = llguidance.TokenizerWrapper(_Tokens(tokenizer, preprocessor, ends))
    return llguidance.LLTokenizer(wrapped, eos_token=list(ends))


class _Tokens:
    """The tokens of one of KerasHub's tokenizers, as llguidance asks for them."""

    def __init__(
        self, tokenizer: Any, preprocessor: Any, ends: tuple[int, ...]
    ) -> None:
        self.eos_token_id = ends[0]
        self.bos_token_id = getattr(preprocessor, "start_token_id", None)
        special = {
            *ends,
            self.bos_token_id,
            getattr(preprocessor, "pad_token_id", None),
        }
        self.special_token_ids = sorted(x for x in special if x is not None)
        size = tokenizer.vocabulary_size()
        self.tokens = [_bytes_of(tokenizer, i) for i in range(size)]
        for i in self.special_token_ids:
            self.tokens[i] = f"<|special {i}|>".encode()
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return [int(x) for x in np.asarray(ops.convert_to_numpy(self._tokenizer(text)))]


def _bytes_of(tokenizer: Any, token_id: int) -> bytes:
    """Returns the bytes of a token."""
    kinds = keras_hub.tokenizers
    if isinstance(tokenizer, kinds.ByteTokenizer):
        return bytes([token_id])
    text = str(tokenizer.id_to_token(token_id))
    if isinstance(tokenizer, kinds.BytePairTokenizer):
        return (
            bytes(_BYTES[x] for x in text)
            if set(text) <= set(_BYTES)
            else text.encode()
        )
    if isinstance(tokenizer, kinds.SentencePieceTokenizer):
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace("\u2581", " ").encode()
    return text.encode()


def _byte_characters() -> dict[str, int]:
    """Returns the bytes by the characters that stand for them in byte-pair encoding."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [x for x in range(256) if x not in printable]
    characters = {chr(x): x for x in printable}
    return characters | {chr(256 + i): x for i, x in enumerate(others)}


_BYTES = _byte_characters()
