"""Checks and shuffles training data that is in memory."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub
import tensorflow as tf
from keras import ops, tree

from attention.contract import describe
from blocks.generation.prompts import is_text, to_plain, to_str
from blocks.generation.token_rows import check_tokens, read_tokens, vocabulary_size
from blocks.preprocessor import CausalLMPreprocessor


def is_in_memory(x: Any) -> bool:
    """Returns whether samples are in memory, not made batch by batch."""
    return isinstance(x, (str, bytes, list, tuple, dict)) or hasattr(x, "shape")


def read_samples(task: Any, x: Any, y: Any = None) -> tuple[Any, Any]:
    """Checks samples that are in memory, as far as their form is known.

    Args:
        task: the `CausalLM`.
        x: text where the model has a preprocessor, else a dict of `token_ids` and
            `padding_mask`. Data that yields batches is not checked.
        y: the targets, or `None`.

    Returns:
        `(x, y)`: text as a list of strings, tokens with 0 for padding.

    Raises:
        TypeError: if `x` is not text where it must be.
        ValueError: if `x` is empty, a token is outside of the vocabulary, or a row is
            not padded on the right.
    """
    if not is_in_memory(x):
        return x, y
    preprocessor = task.preprocessor
    if isinstance(preprocessor, keras_hub.models.CausalLMPreprocessor):
        if isinstance(x, dict) and not isinstance(preprocessor, CausalLMPreprocessor):
            return x, y  # with images, perhaps
        texts = to_plain(x)
        if not isinstance(texts, (list, tuple)) or not all(map(is_text, texts)):
            raise TypeError(
                "`x` must be a list of strings: the model has a preprocessor, which "
                f"makes tokens and targets of them. Received: x={describe(x)}"
            )
        texts = [to_str(text) for text in texts]
        if not any(texts):
            raise ValueError(f"`x` has no text. Received: x={describe(texts)}")
        return texts, y
    if preprocessor is None and isinstance(x, dict) and "token_ids" in x:
        tokens, *_ = read_tokens(x["token_ids"], x.get("padding_mask"))
        check_tokens(tokens, vocabulary_size(task))
        x = {**x, "token_ids": tokens}
        loss = task.loss
        if (
            isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
            and loss.ignore_class is None
            and hasattr(y, "shape")
        ):
            check_tokens(ops.convert_to_numpy(y), task.output.shape[-1], " (in `y`)")
    return x, y


def shuffled(
    samples: Any, batch_size: int, validation_split: float | None
) -> tuple[tf.data.Dataset, tf.data.Dataset | None]:
    """Returns datasets of samples in memory.

    Args:
        samples: a structure of arrays, or of lists in place of arrays.
        batch_size: int. The size of batches.
        validation_split: float or `None`. The share of the last samples to hold out.

    Returns:
        A dataset of batches, in a new order in each epoch, and one of the held-out
        samples, or `None`.
    """
    samples = tree.map_structure(
        lambda x: (
            x if tf.is_tensor(x) or not ops.is_tensor(x) else ops.convert_to_numpy(x)
        ),
        samples,
    )
    data = tf.data.Dataset.from_tensor_slices(samples)
    kept = int(int(data.cardinality()) * (1 - (validation_split or 0)))
    held_out = data.skip(kept).batch(batch_size) if validation_split else None
    return data.take(kept).shuffle(kept).batch(batch_size), held_out
