"""The methods `fit`, `evaluate` and `predict`, with data of any kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from attention.contract import describe
from blocks.row_weights import pack_samples, weight_rows
from blocks.training.callbacks import start_training
from blocks.training_data import (
    as_dataset,
    batched,
    expected_end,
    from_epoch,
    is_for_keras,
    is_in_memory,
    is_tokens,
    preprocessed,
    read_samples,
)


class FitMixin:
    """Training on data of any kind for language models and for tasks on encoders.

    Attributes:
        learns_tokens: bool. Whether targets are tokens of the vocabulary.
    """

    learns_tokens: bool = True
    preprocessor: Any
    steps_per_execution: Any
    changing_weights: Any

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        validation_split: float | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains the model, as Keras's `fit`.

        Args:
            x: a list of strings, if the model has a preprocessor; for a `CausalLM`, or a
                dict of `prompts` and `responses`, of which only the responses are
                learned, or of `messages`, conversations as for `apply_chat_template`, of
                which only what the assistant says and its stop tokens are; for a task on
                an encoder, or a tuple of two lists of strings, pairs. Else a dict of
                `token_ids`, `padding_mask` and what else the model takes. Or batches of
                these, or of tuples with targets and weights: a `tf.data.Dataset`, a torch
                `DataLoader`, a `keras.utils.PyDataset`, a Grain dataset, a generator,
                `blocks.PackedDocuments`. Tokens need no preprocessor, and pass it by.
            y: what is learned, where the preprocessor doesn't make it: of a language
                model the next token of each.
            batch_size: int or `None`, which means 32.
            sample_weight: the weight of each target, or `None`. Where the preprocessor
                makes the targets, one for each text, of shape `(batch,)`.
            validation_data: what is evaluated after each epoch: as `x`, or a tuple of
                `x`, `y` and `sample_weight`, of any kind, whatever the kind of `x`.
            validation_split: float or `None`. The share of the samples, the last ones,
                that is held out for it, if there is no `validation_data`.
            **kwargs: see `keras.Model.fit`. Samples in memory are shuffled in each
                epoch, unless `shuffle=False`.

        Returns:
            A `keras.callbacks.History`. Beside the loss of a `CausalLM` or a `Seq2SeqLM`
            there is `tokens_per_second`, without padding and without the first step,
            which compiles, if the loss is the default or another `TokenCrossentropy`.

        Raises:
            FloatingPointError: if the loss of a step is NaN or infinite, before a
                callback saves the weights. (A `keras.callbacks.TerminateOnNaN` among
                the callbacks takes the place of this.)
            TypeError: if `x` is no text where it must be.
            ValueError: if `x` is empty, also in a later epoch, a token of `x` or `y` is
                outside of the vocabulary, a row is not padded on the right, or a `beta`
                of the optimizer is 1 in the dtype of the weights, as 0.999 in bfloat16.
                If there is a `validation_split` of data that are not in memory, or data
                that can be read only once are to be read in several epochs, without
                `steps_per_epoch` or `validation_steps`.
        """
        passed, seed = start_training(self, kwargs)
        x = as_dataset(x)
        validation_data = as_dataset(validation_data, "validation_data")
        _check_epochs("x", x, "steps_per_epoch", kwargs)
        if kwargs.get("validation_freq", 1) == 1:
            steps = "validation_steps"
            _check_epochs("validation_data", validation_data, steps, kwargs)
        in_memory = is_in_memory(x)
        if validation_data is not None:
            validation_split = None
        elif validation_split and not in_memory:
            raise ValueError(
                "`validation_split` holds out samples in memory, and there is no telling "
                "which batches are the last. Pass `validation_data`. Received: "
                f"x={describe(x)}"
            )
        x, y, sample_weight = read_samples(self, x, y, sample_weight)
        if validation_data is not None:
            parts = validation_data
            parts = parts if isinstance(parts, tuple) else (parts,)
            parts = read_samples(self, *parts)
            validation_data = pack_samples(*parts)
            if is_in_memory(parts[0]):
                size = batch_size or 32
                validation_data, _ = batched(validation_data, size, shuffle=False)
        if in_memory:
            samples = pack_samples(x, y, sample_weight)
            how = validation_split, seed, kwargs.pop("shuffle", True)
            x, held_out = batched(samples, batch_size or 32, *how)
            validation_data = held_out if validation_data is None else validation_data
            y = batch_size = sample_weight = validation_split = None
        if passed is not None:
            if isinstance(x, tf.data.Dataset):
                x = x.map(self.preprocess_samples, tf.data.AUTOTUNE)
            x = from_epoch(x, passed, kwargs, self.steps_per_execution)
        if getattr(x, "num_batches", None) is None:
            # Keras shuffles a `PyDataset` of known length, and nothing else.
            kwargs.setdefault("shuffle", False)
        asked = kwargs.get("steps_per_epoch"), kwargs.get("validation_steps")
        with expected_end((x, asked[0]), (validation_data, asked[1])):
            if is_for_keras(x) or is_for_keras(validation_data):
                # Past KerasHub's `fit`, and so past the one that counts.
                kwargs |= {"y": y, "sample_weight": sample_weight}
                kwargs["validation_data"] = preprocessed(self, validation_data)
                with self.changing_weights():
                    return keras.Model.fit(self, preprocessed(self, x), **kwargs)
            data = (x, y, batch_size, sample_weight, validation_data, validation_split)
            return super().fit(*data, **kwargs)  # type: ignore[misc]

    def preprocess_samples(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> Any:
        """Returns training samples of texts by the preprocessor; tokens as they are."""
        if is_tokens(x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        # KerasHub's preprocessors drop the weights where they make their own.
        return weight_rows(super().preprocess_samples(x, y), sample_weight)  # type: ignore[misc]

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        x, steps, in_memory = as_dataset(x), kwargs.get("steps"), is_in_memory(x)
        kwargs |= {"verbose": verbose}
        with expected_end((x, steps)):
            if is_for_keras(x):
                kwargs |= {"y": y, "sample_weight": sample_weight}
                return keras.Model.evaluate(self, preprocessed(self, x), **kwargs)
            x, y, sample_weight = read_samples(self, x, y, sample_weight)
            if in_memory:
                samples = pack_samples(x, y, sample_weight)
                x, _ = batched(samples, batch_size or 32, shuffle=False)
                y = sample_weight = batch_size = None
            data = (x, y, batch_size)
            return super().evaluate(*data, sample_weight=sample_weight, **kwargs)  # type: ignore[misc]

    def predict(
        self, x: Any = None, batch_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        x, steps, in_memory = as_dataset(x), kwargs.get("steps"), is_in_memory(x)
        with expected_end((x, steps)):
            if is_for_keras(x):
                return keras.Model.predict(self, preprocessed(self, x), *args, **kwargs)
            x, *_ = read_samples(self, x)
            if in_memory:
                x, _ = batched((x,), batch_size or 32, shuffle=False)
                batch_size = None
            return super().predict(x, batch_size, *args, **kwargs)  # type: ignore[misc]


def _check_epochs(name: str, data: Any, steps: str, options: dict[str, Any]) -> None:
    """Raises a `ValueError` if data are to be read in several epochs, and can't be.

    Keras would begin each later epoch with the first batches again, and end it there.

    Args:
        name: the argument of `fit`.
        data: its value.
        steps: the argument that says how many batches an epoch has.
        options: other arguments of `fit`.
    """
    epochs = options.get("epochs", 1) - options.get("initial_epoch", 0)
    if isinstance(data, Iterator) and epochs > 1 and options.get(steps) is None:
        raise ValueError(
            f"`{name}` can be read only once, and not for {epochs} epochs. Pass what can "
            f"be read again, such as a list or a `keras.utils.PyDataset`, or `{steps}`. "
            f"Received: {name}={describe(data)}"
        )
