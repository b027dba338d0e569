"""Compiling, gradients and full precision on each backend."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops


def to_numpy(x: Any) -> np.ndarray:
    """Returns a tensor as an array; floating point as `float32` or wider."""
    array = ops.convert_to_numpy(x)
    if array.dtype.kind in "biu" or array.dtype == np.float64:
        return array
    return array.astype("float32")


def has_compiler() -> bool:
    return keras.config.backend() in ("tensorflow", "jax")


def compile_call(function: Callable) -> Callable:
    """Compiles a function of pytrees of tensors: by XLA on TensorFlow, jit on JAX."""
    if keras.config.backend() == "jax":
        import jax

        return jax.jit(function)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)
    return function


def gradients(function: Callable, variables: list, inputs: list) -> list:
    """Returns the gradients of a scalar function of tensors, as arrays.

    They are those for trainable variables, and after them those for the inputs; `None`
    where the function doesn't depend on one.
    """
    backend = keras.config.backend()
    tensors = [ops.convert_to_tensor(x) for x in inputs]
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = function(tensors)
        sources = [v.value for v in variables] + tensors
        found = tape.gradient(loss, sources)
        found = [x if x is None else tf.convert_to_tensor(x) for x in found]
    elif backend == "jax":
        import jax

        def loss_of(values: list, tensors: list) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values))):
                return function(tensors)

        # Compiled: operation by operation it would take many times as long.
        values = [v.value for v in variables]
        both = jax.jit(jax.grad(loss_of, argnums=(0, 1)))(values, tensors)
        found = list(itertools.chain(*both))
    else:
        import torch

        tensors = [x.detach().clone().requires_grad_() for x in tensors]
        sources = [v.value for v in variables] + tensors
        loss = function(tensors)
        found = [None] * len(sources)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, sources, allow_unused=True)
    return [x if x is None else to_numpy(x) for x in found]


def without_gradients(function: Callable) -> Callable:
    """Returns the function as it is run in inference."""
    if keras.config.backend() != "torch":
        return function
    import torch

    return torch.no_grad()(function)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Computes products of float32 in float32, also on GPUs that would round them."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        # A CPU has nothing to round, and rejects the request for float16.
        precision = None if jax.default_backend() == "cpu" else "highest"
        with jax.default_matmul_precision(precision):
            yield
        return
    if backend == "tensorflow":
        import tensorflow as tf

        config = tf.config.experimental
        before = config.tensor_float_32_execution_enabled()
        change: Any = config.enable_tensor_float_32_execution
        full: Any = False
    else:
        import torch

        before = torch.get_float32_matmul_precision()
        change, full = torch.set_float32_matmul_precision, "highest"
    change(full)
    try:
        yield
    finally:
        change(before)


@contextlib.contextmanager
def dtype_policy(policy: Any) -> Iterator[None]:
    """Sets Keras's global dtype policy for a while."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
