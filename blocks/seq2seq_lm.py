"""The encoder-decoder language model, written once for every backbone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from attention.contract import describe
from blocks.generation.backbone_inputs import NAMES
from blocks.generation.prompts import (
    check_tokens,
    is_text,
    read_tokens,
    to_plain,
    to_str,
    vocabulary_size,
)
from blocks.generation.sources import Sources, read_sources
from blocks.language_model import LanguageModel
from blocks.seq2seq_preprocessor import Seq2SeqLMPreprocessor

_TEXTS = ("encoder_text", "decoder_text")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Seq2SeqLM(LanguageModel, keras_hub.models.Seq2SeqLM):
    """An encoder-decoder language model on any backbone with both sides.

    It trains and generates as `blocks.CausalLM`, with the same options. What is continued
    is the target; the encoder runs once for each source, and its keys and values are
    written once.

    Args:
        backbone: a `blocks.CustomSeq2SeqBackbone`, or another functional model with the
            attributes `encoder` and `decoder` that it has.
        preprocessor: a `blocks.Seq2SeqLMPreprocessor` or one of KerasHub's, for strings in
            and strings out; `None` for tokens.
        **kwargs: as for `blocks.CausalLM`.

    Call arguments:
        inputs: a dict of the backbone's inputs: `encoder_token_ids` and
            `encoder_padding_mask`, or other sources; `decoder_token_ids` and
            `decoder_padding_mask`.

    Returns:
        Logits of shape `(batch, length, vocabulary_size)`, of the targets.

    Its `generate`, `stream`, `start`, `prefill` and `score` take sources of

    - text: a string or a list of strings; or a dict of `encoder_text` and
      `decoder_text`, with what targets begin;
    - tokens: an array or a list of rows; or a dict of `encoder_token_ids`,
      `encoder_padding_mask` if rows are padded, and, if there is no preprocessor that
      knows how targets begin, `decoder_token_ids` and `decoder_padding_mask`;
    - other kinds: a dict of the encoder's inputs, and of `decoder_text` or
      `decoder_token_ids`.

    `max_length` and `max_new_tokens` are of targets, and targets are what is returned. In
    a session (`start`) targets are continued.

    Raises:
        TypeError: if `backbone` has not two sides.

    Example:

    >>> import numpy as np
    >>> from blocks import CustomSeq2SeqBackbone, Seq2SeqLM
    >>> backbone = CustomSeq2SeqBackbone(
    ...     vocabulary_size=50,
    ...     num_layers=1,
    ...     num_heads=2,
    ...     hidden_dim=16,
    ...     intermediate_dim=32,
    ...     max_sequence_length=32,
    ... )
    >>> lm = Seq2SeqLM(backbone)
    >>> lm.compile(optimizer="adam", sampler="greedy")
    >>> source, target = np.arange(3, 9)[None], np.array([[1, 8, 7, 6]])
    >>> x = {
    ...     "encoder_token_ids": source,
    ...     "encoder_padding_mask": np.ones_like(source),
    ...     "decoder_token_ids": target[:, :-1],
    ...     "decoder_padding_mask": np.ones_like(target[:, :-1]),
    ... }
    >>> _ = lm.fit(x, target[:, 1:], verbose=0)
    >>> start = {"encoder_token_ids": source, "decoder_token_ids": [[1]]}
    >>> out = lm.generate(start, stop_token_ids=None, max_new_tokens=4)
    >>> out["decoder_token_ids"].shape
    (1, 5)
    """

    target_names = ("decoder_token_ids", "decoder_padding_mask")
    preprocessor_class = Seq2SeqLMPreprocessor

    def _symbolic_inputs(self, backbone: Any) -> dict[str, Any]:
        sides = [getattr(backbone, name, None) for name in ("encoder", "decoder")]
        if not all(isinstance(side, keras.Model) for side in sides):
            raise TypeError(
                "`backbone` must be a `blocks.CustomSeq2SeqBackbone` or another Keras "
                "model with the attributes `encoder` and `decoder`, both Keras models. "
                f"Received: backbone={describe(backbone)}"
            )
        return backbone.input

    @property
    def encoder(self) -> Any:
        """Returns the model that reads sources."""
        return self.backbone.encoder

    @property
    def decoder(self) -> Any:
        """Returns the model that is called on tokens with a KV cache."""
        return self.backbone.decoder

    def compute_hidden_states(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        return self.backbone(inputs, **kwargs)["decoder_sequence_output"]

    def split_inputs(self, inputs: Any) -> tuple[Sources | None, Any]:
        """Returns the sources among the inputs of `generate`, and the prompts."""
        if not isinstance(inputs, dict):
            one_time = isinstance(inputs, Iterator)
            inputs = list(inputs) if one_time else to_plain(inputs)
            first = inputs if is_text(inputs) else next(iter(inputs), "")
            name = "encoder_text" if is_text(first) else "encoder_token_ids"
            inputs = {name: inputs}
        known = {*self.encoder.input, *self.target_names, *_TEXTS}
        unknown = sorted(set(inputs) - known)
        if unknown:
            raise ValueError(
                f"The model takes no `{unknown[0]}`. It takes {sorted(known)}. Received: "
                f"inputs={describe(inputs)}"
            )
        texts = inputs.get("encoder_text")
        if texts is None:
            sources, is_single = self._read_sources(inputs)
        else:
            texts = to_plain(texts)
            is_single = is_text(texts)
            sources = self._encode_texts([texts] if is_single else list(texts))
        if inputs.get("decoder_text") is not None:
            return sources, inputs["decoder_text"]
        tokens, mask = (inputs.get(name) for name in self.target_names)
        if tokens is not None:
            given = {"token_ids": tokens, "padding_mask": mask}
            return sources, {name: x for name, x in given.items() if x is not None}
        rows = 1 if is_single else len(next(iter(sources.values())))
        if texts is None:
            return sources, self._first_tokens(rows, is_single)
        return sources, "" if is_single else [""] * rows

    def _first_tokens(self, rows: int, is_single: bool) -> Any:
        """Returns the tokens with which targets begin, for each row."""
        if self.preprocessor is None:
            raise ValueError(
                "It is not known with what targets begin, as the model has no "
                "`preprocessor`. Pass `decoder_token_ids`: for each row a list of its "
                "first tokens, such as a start token."
            )
        encoded = self.preprocess_prompts([""], 8)
        tokens, lengths, _ = read_tokens(*encoded.values())
        row = tokens[0, : lengths[0]]
        return row if is_single else np.tile(row, (rows, 1))

    def _encode_texts(self, texts: list[Any]) -> Sources:
        """Returns the tokens of sources."""
        if self.preprocessor is None:
            raise ValueError(
                "`inputs` is text, but the model has no `preprocessor` to turn it into "
                "tokens. Pass token ids, or make the model with a preprocessor."
            )
        if not texts or not all(map(is_text, texts)):
            raise TypeError(
                "`encoder_text` must be a string or a list of strings. Received: "
                f"encoder_text={describe(texts)}"
            )
        texts = [to_str(text) for text in texts]
        limit = self.preprocessor.encoder_sequence_length
        encoded = self.preprocessor.generate_preprocess(
            {"encoder_text": texts, "decoder_text": [""] * len(texts)},
            encoder_sequence_length=limit + 1,
        )
        names = [name for name in encoded if name.startswith("encoder_")]
        arrays = {name: ops.convert_to_numpy(encoded[name]) for name in names}
        lengths = arrays["encoder_padding_mask"].astype(bool).sum(axis=1)
        if lengths.max() > limit:
            raise ValueError(
                f"Source {int(lengths.argmax())} has more than the preprocessor's "
                f"`encoder_sequence_length` of {limit} tokens. Shorten it, or make the "
                "preprocessor with a larger one."
            )
        arrays = {name: x[:, : max(lengths.max(), 1)] for name, x in arrays.items()}
        return self._read_sources(arrays)[0]

    def _read_sources(self, inputs: dict[str, Any]) -> tuple[Sources, bool]:
        limit = self._engine().max_source_positions
        sources, is_single = read_sources(inputs, self.encoder.input, limit)
        for name in (name for name in sources if name.endswith("token_ids")):
            # A backbone may have another vocabulary for sources.
            size = getattr(self.backbone, "source_vocabulary_size", None)
            size = size or vocabulary_size(self)
            check_tokens(sources[name], size, f" (in `{name}`)")
        return sources, is_single

    def preprocess_prompts(self, texts: list[str], length: int) -> dict[str, Any]:
        encoded = self.preprocessor.generate_preprocess(
            {"encoder_text": [""] * len(texts), "decoder_text": texts},
            decoder_sequence_length=length,
        )
        return {name: encoded[f"decoder_{name}"] for name in NAMES}
