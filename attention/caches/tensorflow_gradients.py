"""The gradient of `keras.ops.slice_update`, which TensorFlow lacks."""

from __future__ import annotations

import contextlib
from typing import Any

import keras


def register() -> None:
    """Lets gradients flow through caches that are written with `slice_update`.

    JAX and torch have this gradient. TensorFlow has the operation without one,
    so that training on what follows a cached prefix fails there.
    """
    if keras.config.backend() != "tensorflow":
        return
    import tensorflow as tf

    def gradient(op: Any, upstream: Any) -> tuple[Any, Any, None]:
        _, update, start = op.inputs
        size = tf.shape(update)
        # As the operation does: a slice that does not fit is moved to the front.
        start = tf.clip_by_value(start, 0, tf.shape(upstream) - size)
        zeros = tf.zeros_like(update)
        kept = keras.ops.slice_update(upstream, start, zeros)
        return kept, tf.slice(upstream, start, size), None

    # Somebody else may have registered it, a newer TensorFlow perhaps.
    with contextlib.suppress(KeyError):
        tf.RegisterGradient("XlaDynamicUpdateSlice")(gradient)
