"""Checks training data, and shuffles what is in memory."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub
import tensorflow as tf
from keras import ops, tree

from attention.contract import describe
from blocks.generation.prompts import (
    check_tokens,
    is_text,
    read_tokens,
    to_plain,
    to_str,
    vocabulary_size,
)
from blocks.preprocessor import CausalLMPreprocessor


def is_in_memory(x: Any) -> bool:
    """Returns whether samples are in memory, not made batch by batch."""
    return isinstance(x, (str, bytes, list, tuple, dict)) or hasattr(x, "shape")


def read_samples(task: Any, x: Any, y: Any = None) -> tuple[Any, Any]:
    """Checks samples that are in memory, as far as their form is known.

    Returns:
        `(x, y)`: text as a list of strings, tokens with 0 for padding. A
        `tf.data.Dataset` checks its batches; other data that yields batches, as it is.
    """
    if isinstance(x, tf.data.Dataset) and task.preprocessor is None:
        return with_checked_batches(x, vocabulary_size(task)), y
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


def with_checked_batches(data: tf.data.Dataset, size: int | None) -> tf.data.Dataset:
    """Returns the same batches, with an error for tokens or a mask that can't be right.

    A compiled training step can't raise one, and would train on.
    """

    def check_arrays(tokens: Any, *mask: Any) -> None:
        check_tokens(read_tokens(tokens, *mask)[0], size)

    def check(x: Any, *targets: Any) -> Any:
        if isinstance(x, dict) and "token_ids" in x:
            names = [name for name in ("token_ids", "padding_mask") if name in x]
            tf.numpy_function(check_arrays, [x[name] for name in names], [])
        return (x, *targets) if targets else x

    data = data.map(check)
    # Where the first is wrong, it is said before the training on JAX takes the weights.
    next(iter(data.take(1)), None)
    return data


def shuffled(
    samples: Any, batch_size: int, validation_split: float | None
) -> tuple[tf.data.Dataset, tf.data.Dataset | None]:
    """Returns datasets of samples, a structure of arrays or of lists in their place.

    The first is of batches, in a new order in each epoch; the second of the last
    samples, which are held out, or `None`.
    """

    def readable(x: Any) -> Any:
        is_foreign = ops.is_tensor(x) and not tf.is_tensor(x)
        return ops.convert_to_numpy(x) if is_foreign else x

    data = tf.data.Dataset.from_tensor_slices(tree.map_structure(readable, samples))
    kept = int(int(data.cardinality()) * (1 - (validation_split or 0)))
    held_out = data.skip(kept).batch(batch_size) if validation_split else None
    return data.take(kept).shuffle(kept).batch(batch_size), held_out
