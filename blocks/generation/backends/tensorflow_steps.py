"""Compiling a step of generation on TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Callable

import tensorflow as tf


def compile_step(function: Callable, xla: bool) -> Callable:
    """Returns `function` as a `tf.function`, compiled by XLA if `xla`.

    XLA makes decoding faster on every device (`python -m benchmarks.generate` measures
    it; `compile(jit_compile=False)` turns it off), but never frees the memory of
    compiled code. So code that may be used again is kept, not compiled again.
    """
    # TensorFlow warns of frequent retracing. It counts by a function's code, which all
    # steps share, even if each is traced once; an object without code is counted alone.
    alone = functools.partial(function)
    return tf.function(alone, jit_compile=xla, autograph=False)
