"""A preprocessor of sources and targets, for any tokenizer."""

from __future__ import annotations

import os
from typing import Any

import keras
import keras_hub

from attention.contract import check_positive_int
from blocks.hugging_face_files import read_preprocessor
from blocks.special_tokens import SpecialTokens, checked_tokenizer
from blocks.start_packer import StartPacker

_NAMES = ("encoder_sequence_length", "decoder_sequence_length")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Seq2SeqLMPreprocessor(SpecialTokens, keras_hub.models.Seq2SeqLMPreprocessor):
    """Turns pairs of strings into training samples and prompts, with any tokenizer.

    Called on a dict of `encoder_text` and `decoder_text`, it returns `(x, y,
    sample_weight)` for `fit`: `x` is a dict of `encoder_token_ids`,
    `encoder_padding_mask`, `decoder_token_ids` and `decoder_padding_mask`, `y` the next
    token of the targets, and the weights leave out padding. Sources that are too long
    are cut.

    Args:
        tokenizer: a `keras_hub.tokenizers.Tokenizer`, of sources and targets.
        encoder_sequence_length: int. The length of sources.
        decoder_sequence_length: int. The length of targets, and the default `max_length`
            of `generate`.
        start_token: str, int or `None`. The token put before each source. `None` takes
            the tokenizer's `start_token_id`, if it has one.
        end_token: str, int or `None`. The token put after each source and target, at
            which `generate` stops. `None` takes the tokenizer's, if it has one.
        pad_token_id: int or `None`. The id of padding. `None` takes the tokenizer's
            `pad_token_id`, or else 0.
        decoder_start_token: str, int, a list of these, or `None`. With what targets begin.
            `None` means the start token, or padding if there is none, as for T5.
        stop_token_ids: list of int or `None`. The tokens at which `generate` stops, where
            these are others than the end token.
        add_start_token: bool. Whether sources begin with the start token.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if `tokenizer` is not a tokenizer that returns integers.
        ValueError: if a token is not in the vocabulary.

    Example:

    >>> import keras_hub
    >>> from blocks import Seq2SeqLMPreprocessor
    >>> tokenizer = keras_hub.tokenizers.ByteTokenizer(lowercase=False)
    >>> preprocessor = Seq2SeqLMPreprocessor(tokenizer, 8, 4, end_token=1)
    >>> pairs = {"encoder_text": ["abc"], "decoder_text": ["AB"]}
    >>> x, y, sample_weight = preprocessor(pairs)
    >>> [int(t) for t in x["decoder_token_ids"][0]], [int(t) for t in y[0]]
    ([0, 65, 66, 1], [65, 66, 1, 0])
    """

    target = "decoder_"

    def __init__(
        self,
        tokenizer: Any,
        encoder_sequence_length: int = 1024,
        decoder_sequence_length: int = 1024,
        start_token: str | int | None = None,
        end_token: str | int | None = None,
        pad_token_id: int | None = None,
        decoder_start_token: Any = None,
        stop_token_ids: list[int] | None = None,
        add_start_token: bool = True,
        **kwargs: Any,
    ) -> None:
        lengths = zip(_NAMES, (encoder_sequence_length, decoder_sequence_length))
        super().__init__(
            checked_tokenizer(tokenizer),
            *(check_positive_int(*pair) for pair in lengths),
            **kwargs,
        )
        self._set_special_tokens(start_token, end_token, pad_token_id, stop_token_ids)
        self.decoder_start_token = decoder_start_token
        self.add_start_token = add_start_token
        self._check_special_tokens()

    @classmethod
    def from_hugging_face(
        cls,
        folder: str | os.PathLike,
        sequence_length: int = 1024,
        vocabulary_size: int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMPreprocessor:
        """Makes a preprocessor from the folder of a published model.

        The arguments are those of `CausalLMPreprocessor.from_hugging_face`;
        `sequence_length` is that of sources and of targets.
        """
        arguments = read_preprocessor(folder, vocabulary_size)
        del arguments["chat_template"]
        arguments |= dict.fromkeys(_NAMES, sequence_length)
        return cls(**{**arguments, **kwargs})

    @property
    def target_start_token_ids(self) -> tuple[int, ...]:
        """Returns the ids of the tokens with which targets begin."""
        given = self.decoder_start_token
        if given is None:
            start = self.start_token_id
            return (self.pad_token_id if start is None else start,)
        given = given if isinstance(given, (list, tuple)) else [given]
        found = (self._token_id("decoder_start_token", token) for token in given)
        return tuple(x for x in found if x is not None)

    def build(self, input_shape: Any) -> None:
        # Not in `__init__`, as the vocabulary of a restored tokenizer is loaded later.
        like = {"end_value": self.end_token_id, "pad_value": self.pad_token_id}
        like["return_padding_mask"] = True
        self.encoder_packer = StartPacker(
            start_value=self.start_token_id if self.add_start_token else None,
            sequence_length=self.encoder_sequence_length,
            **like,
        )
        self.decoder_packer = keras_hub.layers.StartEndPacker(
            start_value=list(self.target_start_token_ids),
            sequence_length=self.decoder_sequence_length,
            **like,
        )
        self.built = True

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update({name: getattr(self, name) for name in _NAMES})
        config["decoder_start_token"] = self.decoder_start_token
        config["add_start_token"] = self.add_start_token
        return config
