"""Checks training data, and makes batches of what is in memory."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from keras import ops, tree

from attention.contract import describe, is_tensor
from blocks.conversations import conversation_samples, is_conversations
from blocks.generation.prompts import (
    check_tokens,
    is_text,
    read_tokens,
    to_plain,
    to_str,
    vocabulary_size,
)
from blocks.preprocessor import CausalLMPreprocessor
from blocks.row_weights import check_row_weights, weight_rows
from blocks.training.token_crossentropy import TokenCrossentropy


def is_in_memory(x: Any) -> bool:
    """Returns whether samples are in memory, not made batch by batch."""
    return isinstance(x, (str, bytes, list, tuple, dict)) or hasattr(x, "shape")


def is_tokens(x: Any) -> bool:
    """Returns whether samples or batches are tokens, for which no preprocessor is needed."""
    x = x[0] if isinstance(x, tuple) and x else x
    return isinstance(x, dict) and not {"token_ids", "decoder_token_ids"}.isdisjoint(x)


def as_dataset(x: Any, argument: str = "x") -> Any:
    """Returns a `tf.data.Dataset` of an iterable of batches, such as a `DataLoader`.

    A table of Hugging Face's `datasets` is read into memory. Datasets of
    TensorFlow are not tuned while they are read. Samples in memory, `None`, datasets of
    Grain, and what `is_for_keras` are returned as they are; of `PackedDocuments` of an
    iterator, which can be read only once, an iterator.
    """
    nothing = f"`{argument}` has no batch. Received: {argument}={describe(x)}"
    if isinstance(x, tf.data.Dataset):
        if int(x.cardinality()) == 0:
            raise ValueError(nothing)
        return ends_at_once(x)
    if isinstance(getattr(x, "documents", None), Iterator):
        return iter(x)
    if hasattr(x, "column_names") and hasattr(x, "features"):
        columns = {name: list(x[name]) for name in x.column_names}
        return columns["text"] if list(columns) == ["text"] else columns
    read = is_in_memory(x) or is_for_keras(x) or hasattr(x, "map")
    if read or not isinstance(x, Iterable):
        return x

    def signature(array: np.ndarray) -> tf.TensorSpec:
        kind = tf.string if array.dtype.kind in "OSU" else array.dtype
        return tf.TensorSpec([None] * array.ndim, kind)

    first = next(iter(x), None)
    if first is None:
        raise ValueError(nothing)
    if is_conversations(first):
        raise TypeError(
            "Batches of conversations must come from a generator or a "
            "`keras.utils.PyDataset`. From other data, pass batches of what the model's "
            "`preprocessor` makes of them, or `blocks.PackedDocuments`. Received: "
            f"{argument}={describe(x)}"
        )
    data = tf.data.Dataset.from_generator(
        lambda: map(_as_batch, x),
        output_signature=tree.map_structure(signature, _as_batch(first)),
    )
    if isinstance(x, Sized):
        data = data.apply(tf.data.experimental.assert_cardinality(len(x)))
    return ends_at_once(data)


def ends_at_once(data: tf.data.Dataset) -> tf.data.Dataset:
    """Returns a dataset that is not tuned while it is read, unless its options say so.

    The thread that tunes it sleeps for 10 ms, then 20, 40 and so on, and whoever has read
    the dataset to its end waits until it wakes up: up to as long again as an epoch took.
    """
    if data.options().autotune.enabled is not None:
        return data
    options = tf.data.Options()
    options.autotune.enabled = False
    return data.with_options(options)


def is_for_keras(x: Any) -> bool:
    """Returns whether data are a `keras.utils.PyDataset` or can be read only once.

    KerasHub reads none of these, and `tf.data` would read ahead of what is used.
    """
    return isinstance(x, (keras.utils.PyDataset, Iterator))


class PreprocessedDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches are preprocessed."""

    def __init__(self, data: keras.utils.PyDataset, preprocess: Callable) -> None:
        super().__init__(data.workers, max_queue_size=data.max_queue_size)
        self._data, self._preprocess = data, preprocess

    @property
    def num_batches(self) -> int | None:
        return self._data.num_batches

    def __getitem__(self, index: int) -> Any:
        return self._preprocess(self._data[index])

    def on_epoch_begin(self) -> None:
        self._data.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._data.on_epoch_end()


def preprocessed(task: Any, x: Any) -> Any:
    """Returns data of any kind, or `None`, with each batch preprocessed, for Keras."""

    def preprocess(batch: Any) -> Any:
        if task.preprocessor is None or is_tokens(batch):
            return batch
        if is_conversations(batch):
            return read_samples(task, batch)
        x, *targets = batch if isinstance(batch, tuple) else (batch,)
        targets = [y if y is None else _as_batch(y) for y in targets]
        samples = task.preprocess_samples(_texts(x), *targets)
        return tree.map_structure(ops.convert_to_numpy, samples)

    if isinstance(x, keras.utils.PyDataset):
        return PreprocessedDataset(x, preprocess)
    if isinstance(x, Iterator):
        return (preprocess(batch) for batch in x)  # Keras asks for a generator.
    if isinstance(x, tf.data.Dataset):
        samples = x.map(task.preprocess_samples, tf.data.AUTOTUNE)
        return samples.prefetch(tf.data.AUTOTUNE)
    return x.map(preprocess) if hasattr(x, "map") else x


def _texts(x: Any) -> Any:
    """Returns text, or a dict or a tuple of texts, as a string or lists."""
    if isinstance(x, tuple):
        return tuple(map(to_plain, x))
    if isinstance(x, dict):
        return {name: to_plain(value) for name, value in x.items()}
    return to_plain(x)


def _as_batch(batch: Any) -> Any:
    """Returns arrays in a tuple or a dict; a list is one array, such as of strings."""
    if isinstance(batch, dict):
        return {name: _as_batch(value) for name, value in batch.items()}
    if isinstance(batch, list) and any(map(is_tensor, batch)):
        batch = tuple(batch)  # as a `DataLoader` has it
    if isinstance(batch, tuple):
        return tuple(map(_as_batch, batch))
    return ops.convert_to_numpy(batch) if is_tensor(batch) else np.asarray(batch)


def read_samples(
    task: Any, x: Any, y: Any = None, sample_weight: Any = None
) -> tuple[Any, Any, Any]:
    """Checks samples that are in memory, as far as their form is known.

    Returns:
        `(x, y, sample_weight)`: text as a list of strings, tokens with 0 for padding,
        conversations as tokens with their targets and weights. A `tf.data.Dataset`
        checks its batches; other data that yields batches, as it is.
    """
    if is_conversations(x):
        if not isinstance(task.preprocessor, CausalLMPreprocessor):
            raise ValueError(
                "Conversations need a `blocks.CausalLMPreprocessor` with a chat "
                f"template. The model's preprocessor is {describe(task.preprocessor)}"
            )
        # Past Keras, whose error would show all of them.
        samples = conversation_samples(task.preprocessor, x)
        return weight_rows(samples, sample_weight)
    x, y = _read_samples(task, x, y)
    makes_targets = isinstance(task.preprocessor, keras_hub.models.Preprocessor)
    if makes_targets and task.learns_tokens and is_in_memory(x) and not is_tokens(x):
        columns = list(x.values()) if isinstance(x, dict) else x
        rows = len(columns[0] if isinstance(x, (dict, tuple)) else columns)
        check_row_weights(sample_weight, (rows,))
    return x, y, sample_weight


def _read_samples(task: Any, x: Any, y: Any) -> tuple[Any, Any]:
    if isinstance(x, tf.data.Dataset) and (
        task.preprocessor is None or is_tokens(x.element_spec)
    ):
        return with_checked_batches(x, vocabulary_size(task)), y
    if not is_in_memory(x):
        return x, y
    preprocessor = task.preprocessor
    if is_tokens(x):
        preprocessor = None
    if isinstance(preprocessor, CausalLMPreprocessor) and isinstance(x, dict):
        return read_answers(x), y
    if isinstance(preprocessor, keras_hub.models.Seq2SeqLMPreprocessor):
        return read_pairs(x), y
    if isinstance(preprocessor, keras_hub.models.CausalLMPreprocessor):
        if isinstance(x, dict):
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
    if isinstance(x, (str, bytes)):
        raise TypeError(f"`x` must be a list of strings. Received: x={describe(x)}")
    if preprocessor is None and is_tokens(x):
        x = dict(x)
        for name, mask in _token_inputs(x):
            x[name], *_ = read_tokens(x[name], x.get(mask), name)
            check_tokens(x[name], vocabulary_size(task))
        loss = task.loss
        if (
            isinstance(
                loss, (TokenCrossentropy, keras.losses.SparseCategoricalCrossentropy)
            )
            and task.learns_tokens
            and loss.ignore_class is None
            and hasattr(y, "shape")
        ):
            check_tokens(ops.convert_to_numpy(y), task.output.shape[-1], " (in `y`)")
    return x, y


def _token_inputs(x: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the names of inputs of tokens, and those of their masks."""
    names = [name for name in x if name.endswith("token_ids")]
    return [(x, x.removesuffix("token_ids") + "padding_mask") for x in names]


def read_columns(x: Any, names: tuple[str, ...]) -> dict[str, list[str]] | None:
    """Returns the strings of a dict of texts; `None` if it is no dict of these lists."""
    texts = _texts(x) if isinstance(x, dict) else {}
    fits = all(
        isinstance(x, (list, tuple)) and all(map(is_text, x)) for x in texts.values()
    )
    if set(texts) != set(names) or not fits:
        return None
    return {name: [to_str(text) for text in texts[name]] for name in names}


def read_answers(x: dict[str, Any], argument: str = "x") -> dict[str, list[str]]:
    """Returns prompts and their responses as lists of strings."""
    texts = read_columns(x, ("prompts", "responses"))
    if texts is None:
        raise TypeError(
            f"`{argument}` must be a list of strings, or a dict of `prompts` and `responses`, both "
            "lists of strings: the model has a preprocessor, which makes tokens and "
            f"targets of them. Received: {argument}={describe(x)}"
        )
    prompts, responses = len(texts["prompts"]), len(texts["responses"])
    if prompts != responses or not any(texts["responses"]):
        raise ValueError(
            f"`{argument}` must have a response for each prompt. Received: "
            f"{prompts} prompts and {responses} responses"
            + ("" if any(texts["responses"]) else ", which are all empty")
        )
    return texts


def read_pairs(x: Any) -> dict[str, list[str]]:
    """Returns sources and targets as lists of strings."""
    texts = read_columns(x, ("encoder_text", "decoder_text"))
    if texts is None or len(set(map(len, texts.values()))) > 1:
        raise TypeError(
            "`x` must be a dict of `encoder_text` and `decoder_text`, two lists of as many "
            "strings: the model has a preprocessor, which makes tokens and targets of "
            f"them. Received: x={describe(x)}"
        )
    return texts


def with_checked_batches(data: tf.data.Dataset, size: int | None) -> tf.data.Dataset:
    """Returns the same batches, with an error for tokens or a mask that can't be right.

    A compiled training step can't raise one, and would train on.
    """

    def check_arrays(tokens: Any, *mask: Any) -> None:
        check_tokens(read_tokens(tokens, *mask)[0], size)

    def check(x: Any, *targets: Any) -> Any:
        for names in _token_inputs(x) if is_tokens(x) else ():
            given = [x[name] for name in names if name in x]
            tf.numpy_function(check_arrays, given, [])
        return (x, *targets) if targets else x

    data = data.map(check)
    # Where the first is wrong, it is said before the training on JAX takes the weights.
    if next(iter(data.take(1)), None) is None:
        raise ValueError(f"The dataset has no batch. Received: {describe(data)}")
    return data


@contextlib.contextmanager
def expected_end(*data: tuple[Any, int | None]) -> Iterator[None]:
    """Leaves out Keras's warning at the end of data whose length it does not know.

    Args:
        *data: tuples of data and how many steps of it are asked for, or `None`.
    """
    unknown = tf.data.UNKNOWN_CARDINALITY
    with warnings.catch_warnings():
        for x, steps in data:
            if isinstance(x, tf.data.Dataset):
                is_known = int(x.cardinality()) != unknown
            else:
                is_known = not isinstance(x, Iterator)
            if steps is None and not is_known:
                warnings.filterwarnings("ignore", "Your input ran out of data")
        yield


def from_epoch(data: Any, passed: int, options: dict[str, Any], at_once: int) -> Any:
    """Returns data that begin after so many epochs.

    What shuffles itself anew in each epoch is in the order that it would have had.

    Args:
        data: what is trained on.
        passed: how many epochs an earlier process has trained.
        options: the arguments of `fit`, of which `steps_per_epoch` is completed.
        at_once: the model's `steps_per_execution`.
    """
    steps_per_epoch = options.get("steps_per_epoch")
    if isinstance(data, tf.data.Dataset):
        length = int(data.cardinality())
        if steps_per_epoch is None and length < 0:
            # Its length is not known, so each epoch begins it anew.
            return data
        steps_per_epoch = options["steps_per_epoch"] = steps_per_epoch or length
        # A dataset is shuffled by how often it has been read before, and Keras reads it
        # more often than there are epochs: so it gets what can be read once.
        data = data.repeat().prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
    if isinstance(data, keras.utils.PyDataset):
        for _ in range(passed):
            data.on_epoch_begin()
            data.on_epoch_end()
    elif isinstance(data, Iterator) and steps_per_epoch:
        read = -(-steps_per_epoch // at_once) * at_once
        begun = itertools.islice(data, passed * read, None)
        data = (batch for batch in begun)  # Keras asks for a generator.
    return data


def batched(
    samples: Any,
    batch_size: int,
    validation_split: float | None = None,
    seed: int | None = None,
    shuffle: bool = True,
) -> tuple[tf.data.Dataset, tf.data.Dataset | None]:
    """Returns datasets of samples, a structure of arrays or of lists in their place.

    The first is of batches, in a new order in each epoch if it is to be shuffled; the
    second of the last samples, which are held out, or `None`.
    """
    data = as_slices(samples)
    kept = int(int(data.cardinality()) * (1 - (validation_split or 0)))
    held_out = data.skip(kept).batch(batch_size) if validation_split else None
    data = data.take(kept)
    data = data.shuffle(kept, seed) if shuffle else data
    return data.batch(batch_size), held_out


def as_slices(samples: Any) -> tf.data.Dataset:
    """Returns a dataset of single samples, of arrays or of lists in their place."""

    def readable(x: Any) -> Any:
        is_foreign = ops.is_tensor(x) and not tf.is_tensor(x)
        return ops.convert_to_numpy(x) if is_foreign else x

    slices = tree.map_structure(readable, samples)
    return ends_at_once(tf.data.Dataset.from_tensor_slices(slices))
