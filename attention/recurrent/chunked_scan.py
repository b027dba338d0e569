"""Linear recurrences: states that decay and are written to, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from attention.contract.sizes import sequence_length, static_size
from attention.recurrent.tensorflow_scan import scan_states
from attention.softmax.banded import cut

# Larger ones take more products within chunks, smaller ones more between them.
CHUNK = 64
# Where each number decays by itself, what came in is divided by how much it decayed
# within a chunk. RWKV's least decay of exp(-0.61) leaves 6e-5 of it after 16 steps.
CHUNK_OF_VECTORS = 16
_NOTHING = -1e30


def linear_recurrence(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    state: Any,
    remove: Any = None,
    replace: Any = None,
) -> tuple[Any, Any]:
    """Reads from a state that decays, forgets along a direction, and is added to.

    ```
    state = exp(log_decay) * state + replace (remove · state) + key value
    output = query · state
    ```

    Computed in chunks: within one as products of matrices, between them by an
    associative scan. Time and memory are linear in the length. A step of one
    token, a chunk and a whole sequence are the same computation.

    Args:
        query: tensor of shape `(batch, length, heads, key_dim)`.
        key: tensor of shape `(batch, length, heads, key_dim)`.
        value: tensor of shape `(batch, length, heads, value_dim)`.
        log_decay: tensor of shape `(batch, length, heads, 1)`, or `(batch, length,
            heads, key_dim)` where each number decays by itself; not positive.
        state: tensor of shape `(batch, heads, key_dim, value_dim)`.
        remove: `None` or tensor of the shape of `key`.
        replace: likewise.

    Returns:
        The outputs, `(batch, length, heads, value_dim)`, and the last state, both
        `float32`.

    Example:

    >>> import numpy as np
    >>> from attention.recurrent.chunked_scan import linear_recurrence
    >>> x = np.ones((1, 3, 1, 1), "float32")
    >>> half = np.log(0.5) * x
    >>> outputs, state = linear_recurrence(x, x, x, half, np.zeros((1, 1, 1, 1)))
    >>> np.array(outputs)[0, :, 0, 0].tolist()
    [1.0, 1.5, 1.75]

    References:

    - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
    - [Yang et al., 2024](https://arxiv.org/abs/2406.06484)
    """
    size = CHUNK if log_decay.shape[-1] == 1 else CHUNK_OF_VECTORS
    chunks = _Chunks(query, size)
    query, key, value, log_decay = map(chunks.cut, (query, key, value, log_decay))
    state = ops.cast(state, "float32")
    # Sums, not differences of sums: where much decays, little would be left of them.
    total = ops.cumsum(log_decay, axis=3)
    end = ops.swapaxes(ops.exp(total[..., -1:, :]), 3, 4)
    within = _Within(log_decay, total)
    # How much of what was written in a chunk is left at its end.
    remaining = ops.flip(ops.cumsum(ops.flip(log_decay, axis=3), axis=3), axis=3)
    left = ops.exp(
        ops.concatenate(
            [remaining[..., 1:, :], ops.zeros_like(remaining[..., :1, :])], axis=3
        )
    )
    # What is read of the state at the chunk's start, and of what was written since.
    from_start = query * ops.exp(total)
    outputs = within.after(query, from_start, key) @ value
    written = _transposed(key * left) @ value
    if remove is None or replace is None:
        kept = ops.broadcast_to(end, (*ops.shape(written)[:4], 1))
        states, state = _states(False, kept, written, state)
        return chunks.join(outputs + from_start @ states), state
    remove, replace = chunks.cut(remove), chunks.cut(replace)
    # What each token finds in the state in front of it: from the chunk's start, and
    # from the tokens before it, which found something, too.
    start = remove * ops.exp(_behind(total))
    from_keys = within.before(remove, start, key) @ value
    from_found = within.before(remove, start, replace)
    start, from_keys = _solve(from_found, start, from_keys)
    found_read = within.after(query, from_start, replace)
    outputs = outputs + found_read @ from_keys
    from_start = from_start + found_read @ start
    left_replace = _transposed(replace * left)
    written = written + left_replace @ from_keys
    diagonal = ops.eye(key.shape[-1], dtype="float32") * end
    states, state = _states(True, diagonal + left_replace @ start, written, state)
    return chunks.join(outputs + from_start @ states), state


class _Chunks:
    """Sequences as `(batch, chunks, heads, size, dim)`.

    Args:
        like: tensor of shape `(batch, length, ...)`.
        size: int. The size of a chunk of longer sequences.
    """

    def __init__(self, like: Any, size: int) -> None:
        self.length = length = sequence_length(like)
        self.size: Any = size
        self.count: Any = 1
        if isinstance(length, int) and length > size:
            self.count = -(-length // size)
        elif length is None or isinstance(length, int):
            self.size = ops.shape(like)[1]
        else:
            self.size = ops.minimum(size, length)
            self.count = -(-length // self.size)

    def cut(self, x: Any) -> Any:
        # What it is filled up with decays nothing, and adds nothing.
        return ops.swapaxes(cut(ops.cast(x, "float32"), self.count, self.size), 2, 3)

    def join(self, x: Any) -> Any:
        x = ops.swapaxes(x, 2, 3)
        x = ops.reshape(x, (-1, self.count * self.size, *x.shape[3:]))
        return x[:, : self.length]


class _Within:
    """What the tokens of a chunk read of what others of it have written.

    Args:
        log_decay: tensor of shape `(batch, chunks, heads, size, 1 or key_dim)`.
        total: its running sums.
    """

    def __init__(self, log_decay: Any, total: Any) -> None:
        places = ops.arange(ops.shape(log_decay)[3], dtype="int32")
        self.later = places[:, None] > places[None]
        self.not_earlier = places[:, None] >= places[None]
        self.left = self.grown = None
        if log_decay.shape[-1] == 1:
            # For each pair the sum of what decays in between.
            between = ops.cumsum(ops.where(self.later, log_decay, 0.0), axis=3)
            self.left = ops.exp(ops.where(self.not_earlier, between, _NOTHING))
        else:
            self.grown = ops.exp(-total)

    def after(self, reader: Any, decayed: Any, written: Any) -> Any:
        """Products of reads and writes, where a read follows its own write.

        Args:
            reader: tensor of shape `(batch, chunks, heads, size, key_dim)`.
            decayed: the reader, times what is left then of the chunk's start.
            written: tensor of the shape of `reader`.
        """
        if self.left is not None:
            return (reader @ _transposed(written)) * self.left
        products = decayed @ _transposed(written * self.grown)
        return ops.where(self.not_earlier, products, 0.0)

    def before(self, reader: Any, decayed: Any, written: Any) -> Any:
        """Likewise, where a read comes before its own decay and write."""
        if self.left is not None:
            return (reader @ _transposed(written)) * _behind(self.left)
        products = decayed @ _transposed(written * self.grown)
        return ops.where(self.later, products, 0.0)


def _behind(x: Any) -> Any:
    """Each position gets what was at the one before it, the first zero."""
    return ops.concatenate([ops.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=3)


def _transposed(x: Any) -> Any:
    return ops.swapaxes(x, -1, -2)


def _solve(strictly_lower: Any, *rights: Any) -> tuple[Any, ...]:
    """Solves `(1 - strictly_lower) x = right` for each right side."""
    size = static_size(strictly_lower, 3)
    if size == 1:
        return rights
    sizes = [x.shape[-1] for x in rights]
    right = ops.concatenate(rights, axis=-1)
    places = ops.arange(ops.shape(strictly_lower)[3], dtype="int32")
    identity = ops.cast(places[:, None] == places[None], "float32")
    matrix = identity - strictly_lower
    solved = ops.solve_triangular(matrix, right, lower=True)
    return tuple(ops.split(solved, [sizes[0]], axis=-1))


def _states(matrices: bool, kept: Any, written: Any, state: Any) -> tuple[Any, Any]:
    """The state in front of each chunk, and the one behind the last.

    Args:
        matrices: whether `kept` are matrices, `(batch, chunks, heads, key_dim,
            key_dim)`, or decays, `(batch, chunks, heads, key_dim, 1)`.
        kept: what each chunk makes of the state in front of it.
        written: tensor of shape `(batch, chunks, heads, key_dim, value_dim)`: what
            it adds.
        state: tensor of shape `(batch, heads, key_dim, value_dim)`.
    """

    times = ops.matmul if matrices else ops.multiply

    def join(first: tuple, second: tuple) -> tuple:
        return times(second[0], first[0]), times(second[0], first[1]) + second[1]

    count = written.shape[1]
    if count is None:
        states = scan_states(matrices, kept, written, state)
        return states[:, :-1], states[:, -1]
    kept, written = _scan(join, (kept, written), count)
    behind = times(kept, state[:, None]) + written
    before = ops.concatenate([state[:, None], behind[:, :-1]], axis=1)
    return before, behind[:, -1]


def _scan(join: Callable, parts: tuple, count: int) -> tuple:
    """Joins each element along axis 1 with all before it, in linear work.

    Keras's own can't be compiled by XLA on TensorFlow.
    """
    if count == 1:
        return parts
    pairs = join(
        tuple(x[:, 0 : count - 1 : 2] for x in parts),
        tuple(x[:, 1:count:2] for x in parts),
    )
    odd = _scan(join, pairs, count // 2)
    # Those in between: the first, and others behind the pairs before them.
    others = (count - 1) // 2
    even = join(
        tuple(x[:, :others] for x in odd),
        tuple(x[:, 2 : count + 1 : 2] for x in parts),
    )
    even = tuple(ops.concatenate([x[:, :1], y], axis=1) for x, y in zip(parts, even))
    return tuple(_interleaved(x, y, count) for x, y in zip(even, odd))


def _interleaved(even: Any, odd: Any, count: int) -> Any:
    both = ops.stack([even[:, : count // 2], odd], axis=2)
    both = ops.reshape(both, (-1, 2 * (count // 2), *both.shape[3:]))
    return both if count % 2 == 0 else ops.concatenate([both, even[:, -1:]], axis=1)
