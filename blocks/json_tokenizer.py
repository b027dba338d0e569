"""A tokenizer made from a `tokenizer.json`, as published models have one."""

from __future__ import annotations

import itertools
import os
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tokenizers

from attention.contract import describe
from blocks.generation.prompts import cut_rows, is_text, read_tokens, to_plain, to_str

FILE_NAME = "tokenizer.json"


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class JsonTokenizer(keras_hub.tokenizers.Tokenizer):
    """A tokenizer made from a `tokenizer.json` of the `tokenizers` package.

    It works wherever KerasHub's tokenizers do: with `blocks.CausalLMPreprocessor`, in a
    `tf.data.Dataset`, in `.keras` files and in presets.

    The ids are those of `transformers`, but for the special tokens that a text begins
    or ends with. As with KerasHub's tokenizers, these are left to the preprocessor: what
    the file puts before each text is the `start_token_id`, and what it puts after
    each is the `end_token_id`; both are `None` where it puts nothing. Special tokens
    within a text are found.

    Args:
        tokenizer_json: str, path or `None`. The path of a `tokenizer.json`, or its text.
            `None` makes a tokenizer whose vocabulary is loaded later, as from a preset.
        dtype: str. The integer type of the ids.
        pad_token, mask_token: str or `None`. The tokens of padding and of what a masked
            language model guesses, which a `tokenizer.json` doesn't tell. KerasHub's
            preprocessors for encoders read their ids here.
        **kwargs: arguments of `keras_hub.tokenizers.Tokenizer`.

    Call arguments:
        inputs: a string, a list of strings, or a string tensor of rank 0 or 1. Bytes
            that are no UTF-8 become replacement characters.

    Returns:
        The ids: a list of lists, one for each string, or for one string a tensor of
        shape `(length,)`. In a graph of TensorFlow a `tf.RaggedTensor` or a tensor.

    Raises:
        TypeError: if `tokenizer_json` is neither a string nor a path.
        ValueError: if the file can't be read as a `tokenizer.json`, or puts several
            tokens before each text.

    Example:

    >>> import tokenizers
    >>> from blocks import JsonTokenizer
    >>> vocabulary = {"a": 0, "b": 1, "ab": 2, "<|end|>": 3}
    >>> made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")]))
    >>> _ = made.add_special_tokens(["<|end|>"])
    >>> tokenizer = JsonTokenizer(made.to_str())
    >>> tokenizer(["ab", "aab<|end|>"])
    [[2], [0, 2, 3]]
    >>> tokenizer.token_to_id("<|end|>"), tokenizer.vocabulary_size()
    (3, 4)
    """

    def __init__(
        self,
        tokenizer_json: str | os.PathLike | None = None,
        dtype: Any = "int32",
        pad_token: str | None = None,
        mask_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype=dtype, **kwargs)
        self.pad_token, self.mask_token = pad_token, mask_token
        self.file_assets = [FILE_NAME]
        self.pad_token_id: int | None = None
        self.mask_token_id: int | None = None
        self.start_token_id: int | None = None
        self.end_token_id: int | None = None
        self._backend: tokenizers.Tokenizer | None = None
        if tokenizer_json is not None:
            self._set_vocabulary(tokenizer_json)

    def _set_vocabulary(self, tokenizer_json: str | os.PathLike) -> None:
        if not isinstance(tokenizer_json, (str, os.PathLike)):
            raise TypeError(
                "`tokenizer_json` must be the path of a `tokenizer.json`, or its text. "
                f"Received: tokenizer_json={describe(tokenizer_json)}"
            )
        text, source = tokenizer_json, "the text that was passed"
        if not isinstance(text, str) or not text.lstrip().startswith("{"):
            source = f"'{os.fspath(tokenizer_json)}'"
            with open(tokenizer_json, encoding="utf-8", errors="replace") as file:
                text = file.read()
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing more special
            raise ValueError(
                "`tokenizer_json` must be a `tokenizer.json` of the `tokenizers` "
                f"package. {source} is damaged or something else: {error}. Download "
                "it or save it again."
            ) from error
        # Which are of a training that may have needed them.
        backend.no_padding()
        backend.no_truncation()
        before, after = _added_tokens(backend)
        if len(before) > 1:
            raise ValueError(
                f"The `tokenizer.json` puts {len(before)} tokens before each text, and "
                "this layer knows one start token. Take these tokens out of its "
                "`post_processor`, and begin the texts with them."
            )
        self._backend = backend
        self._size = 1 + max(backend.get_vocab().values(), default=-1)
        self.start_token_id = before[0] if before else None
        self.end_token_id = after[-1] if after else None
        for name in ("pad_token", "mask_token"):
            token = getattr(self, name)
            setattr(self, f"{name}_id", token and self.token_to_id(token))

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """Returns the `tokenizers.Tokenizer` that does the work."""
        if self._backend is None:
            raise ValueError(
                "The tokenizer has no vocabulary yet. Pass `tokenizer_json`, or load a "
                "preset that holds one."
            )
        return self._backend

    def tokenize(self, inputs: Any) -> Any:
        """Turns text into ids.

        Args:
            inputs: as when the layer is called.

        Returns:
            A list of lists of ids; for one string an array of shape `(length,)`.
        """
        if not tf.executing_eagerly():
            return self._tokenize_in_graph(inputs)
        inputs = to_plain(inputs)
        if is_text(inputs):
            return np.array(self._encode([inputs])[0], self.compute_dtype)
        return self._encode(inputs)

    def _encode(self, texts: Any) -> list[list[int]]:
        texts = [to_str(text) for text in texts]
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [x.ids for x in encoded]

    def _tokenize_in_graph(self, inputs: Any) -> Any:
        def encode(texts: Any) -> tuple[np.ndarray, np.ndarray]:
            rows = self._encode(np.atleast_1d(texts).tolist())
            ids = np.array([*itertools.chain(*rows)], self.compute_dtype)
            return ids, np.array([len(row) for row in rows], "int64")

        ids, lengths = tf.numpy_function(
            encode, [inputs], [self.compute_dtype, "int64"]
        )
        ids.set_shape([None])
        if inputs.shape.rank == 0:
            return ids
        lengths.set_shape(inputs.shape)
        return tf.RaggedTensor.from_row_lengths(ids, lengths)

    def detokenize(self, inputs: Any) -> Any:
        """Turns ids into text, special tokens included.

        Args:
            inputs: ids of shape `(batch, length)` or `(length,)`: an array, a tensor or
                lists, of which rows may have different lengths.

        Returns:
            A list of strings, or a string for one row.
        """
        tokens, lengths, is_single = read_tokens(inputs, name="inputs")
        rows = [row.tolist() for row in cut_rows(tokens, lengths)]
        texts = self.backend.decode_batch(rows, skip_special_tokens=False)
        return texts[0] if is_single else texts

    def vocabulary_size(self) -> int:
        """Returns the size of the space of ids: one more than the largest."""
        return self._size if self.backend else 0

    @property
    def special_token_ids(self) -> list[int]:
        """Returns the ids of the tokens that no text is made of."""
        added = self.backend.get_added_tokens_decoder()
        return sorted(token_id for token_id, token in added.items() if token.special)

    @property
    def num_separators(self) -> int:
        """Returns how many tokens stand between two texts of a pair."""
        sides = _probe(self.backend).encode("a", "a").sequence_ids
        return sides.index(1) - sides.index(0) - 1

    def get_vocabulary(self) -> list[str]:
        """Returns all tokens, added ones included, in the order of their ids."""
        vocabulary = self.backend.get_vocab()
        return sorted(vocabulary, key=vocabulary.__getitem__)

    def id_to_token(self, id: int) -> str:
        """Returns the token of an id, or raises a `ValueError`."""
        token = None
        if 0 <= id < self.vocabulary_size():
            token = self.backend.id_to_token(int(id))
        if token is None:
            raise ValueError(f"There is no token with the id {id} in the vocabulary.")
        return token

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token, or raises a `ValueError`."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"The token {token!r} is not in the vocabulary.")
        return token_id

    def save_assets(self, dir_path: str) -> None:
        self.backend.save(os.path.join(dir_path, FILE_NAME), pretty=False)

    def load_assets(self, dir_path: str) -> None:
        self._set_vocabulary(os.path.join(dir_path, FILE_NAME))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        tokens = {"pad_token": self.pad_token, "mask_token": self.mask_token}
        return {**config, **{k: v for k, v in tokens.items() if v is not None}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> JsonTokenizer:
        # The vocabulary is an asset: a saved config may not read some other file.
        return cls(**{k: v for k, v in config.items() if k != "tokenizer_json"})


def _added_tokens(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that a tokenizer puts before and after each text."""
    if backend.post_processor is None:
        return [], []
    # Of a word that any tokenizer knows, what else there is has been added.
    encoded = _probe(backend).encode("a")
    position = encoded.special_tokens_mask.index(0)
    return encoded.ids[:position], encoded.ids[position + 1 :]


def _probe(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns a tokenizer whose one token is "a", and that adds the tokens of another."""
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    probe = tokenizers.Tokenizer(model)
    if backend.post_processor is not None:
        probe.post_processor = backend.post_processor
    return probe
