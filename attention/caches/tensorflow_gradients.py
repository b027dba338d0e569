"""The gradient of `keras.ops.slice_update`, which TensorFlow lacks."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from attention.contract.types import Tensor


def register() -> None:
    """Registers the gradient of `slice_update`, so that it flows through caches.

    JAX and torch have it. TensorFlow has the operation without a gradient, so that
    training on tokens after a cached prefix would fail.
    """
    if keras.config.backend() != "tensorflow":
        return
    import tensorflow as tf

    def gradient(op: Any, upstream: Tensor) -> tuple[Any, Any, None]:
        _, update, start = op.inputs
        size = tf.shape(update)
        # As in the operation, a slice that does not fit is moved back.
        start = tf.clip_by_value(start, 0, tf.shape(upstream) - size)
        zeros = tf.zeros_like(update)
        kept = keras.ops.slice_update(upstream, start, zeros)
        return kept, tf.slice(upstream, start, size), None

    # It may be registered already, perhaps by a newer TensorFlow.
    with contextlib.suppress(KeyError):
        tf.RegisterGradient("XlaDynamicUpdateSlice")(gradient)
