"""The special tokens of a preprocessor, for any tokenizer."""

from __future__ import annotations

import contextlib
import json
import numbers
import operator
import os
from typing import Any

import keras
import keras_hub
from keras import ops

from attention.contract import describe
from blocks.generation.endings import end_token_ids
from blocks.generation.prompts import one_text, tokenizer_size
from blocks.preset_files import written_aside
from blocks.row_weights import weight_rows


class SpecialTokens:
    """What preprocessors of decoders and of encoder-decoder models have in common."""

    tokenizer: Any
    config_file: str
    # What the names of the inputs that are generated begin with.
    target = ""

    def _set_special_tokens(
        self,
        start_token: str | int | None,
        end_token: str | int | None,
        pad_token_id: int | None,
        stop_token_ids: list[int] | None,
    ) -> None:
        self.start_token = start_token
        self.end_token = end_token
        self._given_pad_token_id = pad_token_id
        self._given_stop_token_ids = _read_stops(stop_token_ids)

    def _check_special_tokens(self) -> None:
        size = tokenizer_size(self)
        if size is None:
            return
        for name, token_id in (
            *((f"{self.target}start_token", x) for x in self.target_start_token_ids),
            ("end_token", self.end_token_id),
            ("pad_token_id", self.pad_token_id),
            *(("stop_token_ids", token_id) for token_id in self.stop_token_ids),
        ):
            if token_id is not None and not 0 <= token_id < size:
                raise ValueError(
                    f"`{name}` must be in the tokenizer's vocabulary of {size} "
                    f"tokens. Received: {name}={token_id}"
                )

    @property
    def start_token_id(self) -> int | None:
        """Returns the id of the start token, or `None`."""
        return self._token_id("start_token", self.start_token)

    @property
    def end_token_id(self) -> int | None:
        """Returns the id of the end token, or `None`."""
        return self._token_id("end_token", self.end_token)

    @property
    def target_start_token_ids(self) -> tuple[int, ...]:
        """Returns the ids of the tokens with which what is generated may begin."""
        start = self.start_token_id
        return () if start is None else (start,)

    @property
    def pad_token_id(self) -> int:
        """Returns the id of padding."""
        if self._given_pad_token_id is not None:
            return self._given_pad_token_id
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Returns the ids of the tokens at which `generate` stops."""
        if self._given_stop_token_ids is None:
            return end_token_ids(self)
        return tuple(self._given_stop_token_ids)

    def _token_id(self, name: str, token: str | int | None) -> int | None:
        if token is None:
            return getattr(self.tokenizer, f"{name}_id", None)
        if isinstance(token, numbers.Integral):
            return int(token)
        token_id = None
        with contextlib.suppress(KeyError, ValueError, TypeError):
            token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"`{name}={token!r}` is not in the tokenizer's vocabulary."
            )
        return int(token_id)

    def call(
        self, x: Any, y: Any = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """Turns texts into training samples, as KerasHub's.

        Args:
            x: what the preprocessor takes.
            y: not used.
            sample_weight: `None`, or an array or a list of shape `(batch,)`, by which the
                weights of each row are multiplied.
            **kwargs: see KerasHub's.

        Returns:
            `(x, y, sample_weight)`.

        Raises:
            ValueError: if `sample_weight` has another shape.
        """
        return weight_rows(super().call(x, **kwargs), sample_weight)  # type: ignore[misc]

    def generate_postprocess(self, x: Any) -> list[str] | str:
        """Turns tokens back into strings, without start, end and stop tokens.

        Args:
            x: a dict of `token_ids` and `padding_mask` (of an encoder-decoder model,
                `decoder_token_ids` and `decoder_padding_mask`), of shape `(batch,
                length)`, or `(length,)` for one text.

        Returns:
            A list of strings, or a string for one text.
        """
        names = [f"{self.target}token_ids", f"{self.target}padding_mask"]
        token_ids, mask = (ops.convert_to_numpy(x[name]) for name in names)
        mask = mask.astype(bool)
        if token_ids.ndim == 1:
            one = dict(zip(names, (token_ids[None], mask[None])))
            return self.generate_postprocess(one)[0]
        special = {self.end_token_id, *self.target_start_token_ids}
        texts = []
        for tokens, real in zip(token_ids, mask):
            found = tokens[real].tolist()
            if found and found[-1] in self.stop_token_ids:
                found.pop()
            kept = [t for t in found if t not in special]
            texts.append(one_text(self.tokenizer.detokenize([kept])) if kept else "")
        return texts

    def save_to_preset(self, preset_dir: str) -> None:
        """Saves the preprocessor and its tokenizer to a folder, which is made if need be."""
        with written_aside(preset_dir) as folder:
            if self.tokenizer.file_assets:
                super().save_to_preset(folder)  # type: ignore[misc]
                return
            # KerasHub needs files of each tokenizer. One without a vocabulary (of bytes,
            # of code points) has none: its config is all.
            config = keras.saving.serialize_keras_object(self)
            config.pop("build_config", None)
            path = os.path.join(folder, self.config_file)
            with open(path, "w", encoding="utf-8") as file:
                json.dump(config, file, indent=4)

    def load_preset_assets(self, preset: str) -> None:
        """Loads the tokenizer's files from a folder, if it has any."""
        if self.tokenizer.file_assets:
            super().load_preset_assets(preset)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        config.update(
            start_token=self.start_token,
            end_token=self.end_token,
            pad_token_id=self._given_pad_token_id,
            stop_token_ids=self._given_stop_token_ids,
        )
        return config


def checked_tokenizer(tokenizer: Any) -> Any:
    """Returns a tokenizer, or raises a `TypeError` if it is none that makes integers."""
    if not isinstance(tokenizer, keras_hub.tokenizers.Tokenizer):
        raise TypeError(
            "`tokenizer` must be a `keras_hub.tokenizers.Tokenizer`. "
            f"Received: tokenizer={describe(tokenizer)}"
        )
    if "int" not in str(getattr(tokenizer, "compute_dtype", "int32")):
        raise TypeError(
            "`tokenizer` must make integers, but it makes strings. Create "
            'it with `dtype="int32"`.'
        )
    return tokenizer


def _read_stops(token_ids: Any) -> list[int] | None:
    try:
        return None if token_ids is None else [*map(operator.index, token_ids)]
    except TypeError:
        raise TypeError(
            "`stop_token_ids` must be a list of token ids, or `None` for the end token. "
            f"Received: stop_token_ids={describe(token_ids)}"
        ) from None
