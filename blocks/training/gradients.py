"""Gradients within a forward pass, and loops that run one iteration at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from attention.contract import Tensor


def value_and_gradients(
    function: Callable[..., Tensor], arguments: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Returns what a function returns, and the gradients of the first number of it.

    Args:
        function: returns a vector of floats.
        arguments: list of float tensors, the function's.

    Returns:
        `(value, gradients)`, a gradient for each argument, of its shape and dtype.
    """
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        def first(*values: Tensor) -> tuple[Tensor, Tensor]:
            value = function(*values)
            return value[0], value

        places = tuple(range(len(arguments)))
        compute = jax.value_and_grad(first, places, has_aux=True)
        (_, value), gradients = compute(*arguments)
        return value, list(gradients)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(arguments)
            value = function(*arguments)
            first_of = value[0]
        gradients = tape.gradient(first_of, arguments, unconnected_gradients="zero")
        return value, [tf.convert_to_tensor(x) for x in gradients]
    import torch

    with torch.enable_grad():
        arguments = [x.detach().requires_grad_() for x in arguments]
        value = function(*arguments)
        gradients = torch.autograd.grad(value[0], arguments, materialize_grads=True)
    return value.detach(), list(gradients)


def loop(
    count: Any, body: Callable[[Any, list[Tensor]], list[Tensor]], state: list[Tensor]
) -> list[Tensor]:
    """Runs `state = body(i, state)` for `i` from 0 to `count`, and returns the state.

    On TensorFlow no iteration begins before the last one has ended, so that only one
    has its tensors in memory.
    """
    if keras.config.backend() != "tensorflow":
        return ops.fori_loop(0, count, body, state)
    import tensorflow as tf

    return tf.while_loop(
        lambda i, _: i < count,
        lambda i, state: (i + 1, body(i, state)),
        (0, state),
        parallel_iterations=1,
    )[1]


def sum_over_replicas(x: Tensor) -> tuple[Tensor, int]:
    """Returns the sum over all replicas of a `tf.distribute.Strategy`, and their number."""
    if keras.config.backend() != "tensorflow":
        return x, 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return x, 1
    return context.all_reduce("SUM", x), context.num_replicas_in_sync
