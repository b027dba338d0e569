"""A preprocessor for any tokenizer: strings into `fit` and `generate`."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import keras
import keras_hub

from attention.contract import check_positive_int
from blocks.chat_template import render_chats
from blocks.conversations import conversation_samples, is_conversations
from blocks.hugging_face_files import read_preprocessor
from blocks.row_weights import weight_rows
from blocks.special_tokens import SpecialTokens, checked_tokenizer
from blocks.start_packer import StartPacker


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CausalLMPreprocessor(SpecialTokens, keras_hub.models.CausalLMPreprocessor):
    """Turns strings into training samples and prompts, with any tokenizer.

    KerasHub's preprocessors take the tokenizer of their model, which knows its
    special tokens. This one takes any `keras_hub.tokenizers` tokenizer and is
    told which tokens are special.

    Called on strings, it returns `(x, y, sample_weight)` for `fit`: `x` is a
    dict of `token_ids` and `padding_mask`, `y` the next token of each, and the
    weights leave out padding; called on a dict of `prompts` and `responses`, the
    prompts, too, and of `messages`, all but what the assistant says.

    Args:
        tokenizer: a `keras_hub.tokenizers.Tokenizer`.
        sequence_length: int. The length of training samples, and the default
            `max_length` of `generate`.
        start_token: str, int or `None`. The token (or its id) put before each
            text. `None` takes the tokenizer's `start_token_id`, if it has one.
        end_token: str, int or `None`. The token put after each training
            sample, at which `generate` stops. `None` takes the tokenizer's
            `end_token_id`, if it has one.
        pad_token_id: int or `None`. The id of padding. `None` takes the tokenizer's
            `pad_token_id`, or else 0.
        add_start_token: bool. Whether training samples and prompts begin with
            the start token, if there is one. A text that already begins with it, as
            chat templates write it, gets no second one.
        add_end_token: bool. Whether training samples end with the end token, if
            there is one.
        stop_token_ids: list of int or `None`. The tokens at which `generate` stops, where
            these are others than the end token.
        chat_template: str, dict of str or `None`. A Jinja template that turns
            conversations into prompts; a dict has several by name, of which
            `"tool_use"` is used with tools, and `"default"` else.
        **kwargs: arguments of `keras.layers.Layer`.

    Raises:
        TypeError: if `tokenizer` is not a tokenizer that returns integers.
        ValueError: if a token is not in the vocabulary.

    Example:

    >>> import keras_hub
    >>> from blocks import CausalLMPreprocessor
    >>> tokenizer = keras_hub.tokenizers.ByteTokenizer()
    >>> preprocessor = CausalLMPreprocessor(tokenizer, sequence_length=8, end_token=1)
    >>> x, y, sample_weight = preprocessor(["abc"])
    >>> [int(t) for t in y[0]]
    [98, 99, 1, 0, 0, 0, 0, 0]
    >>> preprocessor.generate_postprocess(preprocessor.generate_preprocess(["abc"]))
    ['abc']
    """

    def __init__(
        self,
        tokenizer: Any,
        sequence_length: int = 1024,
        start_token: str | int | None = None,
        end_token: str | int | None = None,
        pad_token_id: int | None = None,
        add_start_token: bool = True,
        add_end_token: bool = True,
        stop_token_ids: list[int] | None = None,
        chat_template: str | dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            checked_tokenizer(tokenizer),
            sequence_length=check_positive_int("sequence_length", sequence_length),
            add_start_token=add_start_token,
            add_end_token=add_end_token,
            **kwargs,
        )
        self._set_special_tokens(start_token, end_token, pad_token_id, stop_token_ids)
        self.chat_template = chat_template
        self._check_special_tokens()

    @classmethod
    def from_hugging_face(
        cls,
        folder: str | os.PathLike,
        sequence_length: int = 1024,
        vocabulary_size: int | None = None,
        **kwargs: Any,
    ) -> CausalLMPreprocessor:
        """Makes a preprocessor from the folder of a published model.

        It reads `tokenizer.json`, and what there is of `tokenizer_config.json`,
        `special_tokens_map.json`, `chat_template.jinja`, `generation_config.json` (the stop
        tokens) and `config.json`. All are plain data: nothing is executed. Prompts
        begin with a start token if the `tokenizer.json` puts one before each
        text.

        Args:
            folder: str or path. The folder.
            sequence_length: int. The length of training samples, and the default
                `max_length` of `generate`.
            vocabulary_size: int or `None`. The size of the model's vocabulary. Added
                tokens beyond it, which a model without images may lack, are left out.
            **kwargs: arguments of the class, which replace those read.

        Returns:
            A `CausalLMPreprocessor` with a `blocks.JsonTokenizer`.

        Raises:
            ValueError: if there is no `tokenizer.json`, or a file is damaged.

        Example:

        >>> import pathlib, tempfile, tokenizers
        >>> from blocks import CausalLMPreprocessor
        >>> model = tokenizers.models.BPE({"a": 0, "b": 1, "<|end|>": 2}, [])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder)
        ...     tokenizers.Tokenizer(model).save(str(path / "tokenizer.json"))
        ...     _ = (path / "generation_config.json").write_text('{"eos_token_id": [2]}')
        ...     preprocessor = CausalLMPreprocessor.from_hugging_face(path)
        >>> preprocessor.stop_token_ids
        (2,)
        """
        arguments = read_preprocessor(folder, vocabulary_size)
        del arguments["decoder_start_token"]
        arguments["sequence_length"] = sequence_length
        return cls(**{**arguments, **kwargs})

    def build(self, input_shape: Any) -> None:
        # Not in `__init__`, as the vocabulary of a restored tokenizer is loaded later.
        self.packer = StartPacker(
            start_value=self.start_token_id if self.add_start_token else None,
            end_value=self.end_token_id,
            pad_value=self.pad_token_id,
            sequence_length=self.sequence_length,
            return_padding_mask=True,
        )
        self.built = True

    def call(  # type: ignore[override]
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> Any:
        """Turns texts into training samples.

        Args:
            x: strings; a dict of `prompts` and `responses`, both strings, of which
                prompts are no targets; or a dict of `messages`, a list of conversations
                as for `apply_chat_template`.
            y: not used.
            sample_weight: `None`, or an array or a list of shape `(batch,)`, by which the
                weights of each row are multiplied.
            sequence_length: int or `None`. The length, if not the preprocessor's.

        Returns:
            `(x, y, sample_weight)`, all of shape `(batch, sequence_length)`.

        Raises:
            ValueError: if `sample_weight` has another shape.
        """
        if not isinstance(x, dict):
            return super().call(x, y, sample_weight, sequence_length=sequence_length)
        if is_conversations(x):
            samples = conversation_samples(self, x, sequence_length)
            return weight_rows(samples, sample_weight)
        if not self.built:
            self.build(None)
        prompts, responses = (self.tokenizer(x[k]) for k in ("prompts", "responses"))
        tokens, mask, is_answer = self.packer.pack_answers(
            prompts,
            responses,
            1 + (sequence_length or self.sequence_length),
            self.add_start_token,
            self.add_end_token,
        )
        x = {"token_ids": tokens[..., :-1], "padding_mask": mask[..., :-1]}
        y, weights = tokens[..., 1:], is_answer[..., 1:]
        return weight_rows((x, y, weights), sample_weight)

    def apply_chat_template(
        self,
        messages: Any,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str | list[str]:
        """Turns conversations into prompts, by the model's `chat_template`.

        The result is what `generate`, `stream` and `start` take. These add the start
        token where texts begin with one, unless the template has written it already.

        Templates are run in Jinja2's sandbox, which keeps them from the interpreter and
        from files. As in `transformers`, a message with the text of a special token has
        that token: don't pass on what strangers wrote where that matters.

        Args:
            messages: list of dicts with `role` and `content`, and whatever else
                the template knows; or a list of such lists.
            tools: list of dicts or `None`. JSON schemas of the functions that the
                model may call.
            add_generation_prompt: bool. Whether the text ends with what comes before
                an answer of the model.
            **variables: plain data for variables of the template, such as
                `enable_thinking=False`.

        Returns:
            A string, or a list with one for each conversation.

        Raises:
            ImportError: if Jinja2 is not installed.
            TypeError: if an argument has the wrong type.
            ValueError: if there is no template, a message lacks a key, or the template
                fails, as for a role that it does not know.

        Example:

        >>> import keras_hub
        >>> from blocks import CausalLMPreprocessor
        >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
        >>> preprocessor = CausalLMPreprocessor(
        ...     keras_hub.tokenizers.ByteTokenizer(), end_token=1, chat_template=template
        ... )
        >>> preprocessor.apply_chat_template([{"role": "user", "content": "Hi"}])
        'user: Hi\\n'
        """
        variables = {
            **self._token_texts(),
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        return render_chats(self.chat_template, messages, tools, **variables)

    def _token_texts(self) -> dict[str, str]:
        """Returns the special tokens as templates call them."""
        ids = {
            "bos_token": self.start_token_id,
            "eos_token": self.end_token_id,
            "pad_token": self._given_pad_token_id,
        }
        texts = {}
        for name, token_id in ids.items():
            # A tokenizer of bytes has no name for each of its tokens.
            with contextlib.suppress(NotImplementedError, ValueError):
                if token_id is not None:
                    texts[name] = self.tokenizer.id_to_token(token_id)
        return texts

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "chat_template": self.chat_template}
