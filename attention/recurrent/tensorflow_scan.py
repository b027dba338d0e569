"""A linear recurrence over as many steps as there are, on TensorFlow."""

from __future__ import annotations

from typing import Any


def scan_states(matrices: bool, kept: Any, written: Any, state: Any) -> Any:
    """The state in front of each chunk, and the one behind the last.

    Where the number of chunks is known when the graph runs only. A loop with a
    gradient of its own, as XLA can't differentiate a loop of a length not known.
    Backwards, a linear recurrence is one with its matrices transposed.

    Args:
        matrices: bool. Whether `kept` are matrices, or numbers for each row of a
            state.
        kept: tensor of shape `(batch, chunks, heads, key_dim, key_dim or 1)`: what a
            chunk makes of the state in front of it.
        written: tensor of shape `(batch, chunks, heads, key_dim, value_dim)`: what
            it adds.
        state: tensor of shape `(batch, heads, key_dim, value_dim)`.

    Returns:
        A tensor of shape `(batch, chunks + 1, heads, key_dim, value_dim)`.
    """
    import tensorflow as tf

    def keep(kept: Any, state: Any, transpose: bool = False) -> Any:
        if matrices:
            return tf.matmul(kept, state, transpose_a=transpose)
        return kept * state

    def step(state: Any, chunk: tuple[Any, Any]) -> Any:
        return keep(chunk[0], state) + chunk[1]

    def step_back(behind: Any, chunk: tuple[Any, Any]) -> Any:
        return keep(chunk[0], behind, transpose=True) + chunk[1]

    @tf.custom_gradient
    def run(kept: Any, written: Any, state: Any) -> tuple[Any, Any]:
        behind = tf.scan(step, (kept, written), state)
        states = tf.concat([state[None], behind], axis=0)

        def gradient(upstream: Any) -> tuple[Any, Any, Any]:
            last = upstream[-1]
            before = tf.scan(step_back, (kept, upstream[:-1]), last, reverse=True)
            behind = tf.concat([before[1:], last[None]], axis=0)
            if matrices:
                of_kept = tf.matmul(behind, states[:-1], transpose_b=True)
            else:
                of_kept = tf.reduce_sum(behind * states[:-1], axis=-1, keepdims=True)
            return of_kept, behind, before[0]

        return states, gradient

    chunks_first = [1, 0, 2, 3, 4]
    kept, written = (tf.transpose(x, chunks_first) for x in (kept, written))
    return tf.transpose(run(kept, written, state), chunks_first)
