"""Compiling a step of generation on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def compile_step(function: Callable, xla: bool) -> Callable:
    """Returns `function` as a `tf.function`, compiled by XLA if `xla`.

    XLA makes decoding faster on every device (`python -m benchmarks.generate` measures
    it; `compile(jit_compile=False)` turns it off), but never gives back the memory of
    what it compiled: what may be used again is kept instead of compiled again.
    """
    return tf.function(_Step(function), jit_compile=xla, autograph=False)


class _Step:
    """A function with a count of retraces of its own.

    TensorFlow warns of frequent retracing, and counts by a function's code, which all
    steps share, even if each is traced once. An object without code counts by itself.
    """

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)
