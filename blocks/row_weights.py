"""Weights of rows, beside those that a preprocessor gives to single targets."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from attention.contract import describe


def pack_samples(x: Any, y: Any, sample_weight: Any) -> Any:
    """Returns samples as Keras's `pack_x_y_sample_weight`, which drops weights of no `y`."""
    if sample_weight is None:
        return keras.utils.pack_x_y_sample_weight(x, y)
    return x, y, sample_weight


def check_row_weights(sample_weight: Any, shape: tuple[int | None, ...]) -> None:
    """Raises a `ValueError` if there are weights, and they are of another shape.

    Args:
        sample_weight: array, list or tensor; or `None`.
        shape: of ints, and of `None` for sizes that aren't known.
    """
    if sample_weight is None:
        return
    found = getattr(sample_weight, "shape", None)
    found = tuple(np.shape(sample_weight) if found is None else found)
    if len(found) != len(shape) or any(
        None not in pair and pair[0] != pair[1] for pair in zip(found, shape)
    ):
        raise ValueError(
            "`sample_weight` must have one number for each text, where the preprocessor "
            f"makes the targets: its shape must be {shape}. Received: "
            f"sample_weight={describe(sample_weight)}"
        )


def weight_rows(samples: Any, sample_weight: Any) -> Any:
    """Returns samples of a preprocessor, with its weights times those of the rows.

    Args:
        samples: `(x, y, weights)`, the weights of shape `(batch, length)`, or `(length,)`
            for one row. Of other samples the weights are those of the rows.
        sample_weight: array, list or tensor of shape `(batch,)`, or `()` for one row; or
            `None`, which changes nothing.

    Raises:
        ValueError: if `sample_weight` has another shape.
    """
    if sample_weight is None:
        return samples
    x, y, weights = keras.utils.unpack_x_y_sample_weight(samples)
    if weights is None:
        return x, y, sample_weight
    check_row_weights(sample_weight, tuple(weights.shape[:-1]))
    if tf.is_tensor(weights):
        rows = tf.cast(sample_weight, "float32")
        return x, y, tf.cast(weights, "float32") * rows[..., None]
    rows = np.asarray(ops.convert_to_numpy(sample_weight), "float32")
    return x, y, ops.convert_to_numpy(weights).astype("float32") * rows[..., None]
