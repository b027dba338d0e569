"""A linear recurrence over a number of steps that is not known, on TensorFlow."""

from __future__ import annotations

from attention.contract.types import Tensor


def scan_states(
    matrices: bool, transition: Tensor, added: Tensor, state: Tensor
) -> Tensor:
    """Returns the state before each chunk and after the last.

    For graphs in which the number of chunks is not known before they run. The loop
    has a gradient of its own, as XLA can't differentiate a loop of unknown length:
    backwards, a linear recurrence is one with its transitions transposed.

    Args:
        matrices: bool. Whether `transition` holds matrices, or decays.
        transition: tensor of shape `(batch, chunks, heads, key_dim, key_dim or 1)`,
            by which each chunk multiplies the state before it.
        added: tensor of shape `(batch, chunks, heads, key_dim, value_dim)`, which
            each chunk adds.
        state: tensor of shape `(batch, heads, key_dim, value_dim)`.

    Returns:
        A tensor of shape `(batch, chunks + 1, heads, key_dim, value_dim)`.
    """
    import tensorflow as tf

    def times(transition: Tensor, state: Tensor, transpose: bool = False) -> Tensor:
        if matrices:
            return tf.matmul(transition, state, transpose_a=transpose)
        return transition * state

    def step(state: Tensor, chunk: tuple[Tensor, Tensor]) -> Tensor:
        return times(chunk[0], state) + chunk[1]

    def step_back(upstream: Tensor, chunk: tuple[Tensor, Tensor]) -> Tensor:
        return times(chunk[0], upstream, transpose=True) + chunk[1]

    @tf.custom_gradient
    def run(transition: Tensor, added: Tensor, state: Tensor) -> tuple:
        after = tf.scan(step, (transition, added), state)
        states = tf.concat([state[None], after], axis=0)

        def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            last = upstream[-1]
            steps = (transition, upstream[:-1])
            before = tf.scan(step_back, steps, last, reverse=True)
            after = tf.concat([before[1:], last[None]], axis=0)
            if matrices:
                of_transition = tf.matmul(after, states[:-1], transpose_b=True)
            else:
                products = after * states[:-1]
                of_transition = tf.reduce_sum(products, axis=-1, keepdims=True)
            return of_transition, after, before[0]

        return states, gradient

    chunks_first = [1, 0, 2, 3, 4]
    transition, added = (tf.transpose(x, chunks_first) for x in (transition, added))
    return tf.transpose(run(transition, added, state), chunks_first)
