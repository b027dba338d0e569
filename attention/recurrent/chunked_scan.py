"""Gated linear recurrences, computed in chunks.

The letters in the comments on shapes are explained in `attention.recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable

from keras import ops

from attention.contract.padding import cut
from attention.contract.segments import segment_starts
from attention.contract.sizes import sequence_length, static_size
from attention.contract.types import Tensor

# Larger chunks mean more products within chunks, smaller ones more between them.
CHUNK = 64
# Where each number has its own decay, keys are divided by the decay since the start of
# the chunk. RWKV's strongest decay, exp(-0.61), leaves 6e-5 after 16 tokens.
CHUNK_OF_VECTORS = 16
_NOTHING = -1e30
# The largest block that is inverted by powers; those of 8 ones have numbers up to 35.
_SMALL = 8


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    state: Tensor,
    remove: Tensor | None = None,
    replace: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the outputs of a gated linear recurrence, and its last state, in float32.

    ```
    state = exp(log_decay) * state + replace (remove · state) + key value
    output = query · state
    ```

    Within a chunk by products of matrices, between chunks by an associative scan. Time
    and memory are linear in the length. One token, a few tokens and a whole sequence
    are the same computation. The arguments are those of `attention.LinearRecurrence`,
    which has no other computation. The first token of a document does not see `state`.

    References:

    - [Dao and Gu, 2024](https://arxiv.org/abs/2405.21060)
    - [Yang et al., 2024](https://arxiv.org/abs/2406.06484)
    """
    size = CHUNK if log_decay.shape[-1] == 1 else CHUNK_OF_VECTORS
    chunks = _Chunks(query, size)
    # (b, l, h, k) -> (b, n, h, c, k)
    query, key, value, log_decay = map(chunks.split, (query, key, value, log_decay))
    state = ops.cast(state, "float32")  # (b, h, k, v)
    # The decay from the start of the chunk to each token, and from each token to the
    # end. Both are sums: the difference of two large sums would have few digits left.
    pairs = _Pairs(log_decay, chunks.begun(segment_ids))
    from_start = pairs.from_start  # (b, n, h, c, 1 or k)
    later = _delay(ops.flip(log_decay, axis=3))
    to_end = ops.exp(ops.flip(ops.cumsum(later, axis=3), axis=3))
    whole = ops.exp(from_start[..., -1:, :])  # (b, n, h, 1, 1 or k)
    old = 1.0  # Whether a token sees the state at the chunk's start.
    if pairs.begun is not None:
        last = pairs.begun[..., -1:, :]
        to_end = to_end * ops.cast(pairs.begun == last, "float32")
        old = ops.cast(pairs.begun == 0, "float32")
        whole = whole * old[..., -1:, :]
    whole = _transpose(whole)
    # Outputs are `query_start · (state at the chunk's start)` and what the chunk adds.
    query_start = query * ops.exp(from_start)  # (b, n, h, c, k)
    outputs = pairs.products(query, query_start, key) @ value  # (b, n, h, c, v)
    added = _transpose(key * to_end) @ value  # (b, n, h, k, v)
    if remove is None or replace is None:
        transition = ops.broadcast_to(whole, (*ops.shape(added)[:4], 1))
        states, state = _chunk_states(False, transition, added, state)
        return chunks.join(outputs + old * query_start @ states), state
    remove, replace = chunks.split(remove), chunks.split(replace)
    # Each token finds `found_start · (state at the chunk's start) + found` along
    # `remove`. Earlier tokens of the chunk have written what they found in turn.
    found_start = remove * ops.exp(_delay(from_start))  # (b, n, h, c, k)
    found = pairs.products(remove, found_start, key, own=False) @ value
    replaced = pairs.products(remove, found_start, replace, own=False)
    found_start, found = _solve(replaced, old * found_start, found)
    read = pairs.products(query, query_start, replace)  # (b, n, h, c, c)
    outputs = outputs + read @ found
    query_start = old * query_start + read @ found_start
    replace_end = _transpose(replace * to_end)  # (b, n, h, k, c)
    added = added + replace_end @ found
    decay = ops.eye(key.shape[-1], dtype="float32") * whole
    transition = decay + replace_end @ found_start  # (b, n, h, k, k)
    states, state = _chunk_states(True, transition, added, state)
    return chunks.join(outputs + query_start @ states), state


class _Chunks:
    """Splits sequences, `(batch, length, ...)`, into chunks and joins them again."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.length = length = sequence_length(like)
        self.size: int | Tensor = size
        self.count: int | Tensor = 1
        if length is None or (isinstance(length, int) and length <= size):
            self.size = ops.shape(like)[1]
        else:
            self.count = -(-length // size)

    def split(self, x: Tensor) -> Tensor:
        """Returns `(b, l, h, dim)` as `(b, n, h, c, dim)`, in float32."""
        # The last chunk is filled up with zeros: no decay, and nothing added.
        return ops.swapaxes(cut(ops.cast(x, "float32"), self.count, self.size), 2, 3)

    def begun(self, segment_ids: Tensor | None) -> Tensor | None:
        """Returns how many documents have begun in a chunk up to each token.

        It is of shape `(b, n, 1, c, 1)`.
        """
        if segment_ids is None:
            return None
        starts = segment_starts(segment_ids)[..., None, None]
        return ops.cumsum(self.split(starts), axis=3)

    def join(self, x: Tensor) -> Tensor:
        """Returns `(b, n, h, c, dim)` as `(b, l, h, dim)`."""
        x = ops.swapaxes(x, 2, 3)  # (b, n, c, h, dim)
        x = ops.reshape(x, (-1, self.count * self.size, *x.shape[3:]))
        return x[:, : self.length]


class _Pairs:
    """Products of tokens that read with tokens of the same chunk that wrote.

    `log_decay` is `(b, n, h, c, 1 or k)`, and so is `from_start`, its sum from the
    start of the chunk or of the token's document; `begun` is as from `_Chunks.begun`.
    """

    def __init__(self, log_decay: Tensor, begun: Tensor | None) -> None:
        index = ops.arange(ops.shape(log_decay)[3], dtype="int32")
        self.later = index[:, None] > index[None]
        self.not_earlier = index[:, None] >= index[None]
        self.decay = self.growth = self.same = None
        self.begun = begun
        if begun is None:
            self.from_start = ops.cumsum(log_decay, axis=3)
        else:
            # Not even the rounding of a sum depends on another document.
            self.same = ops.cast(begun == _transpose(begun), "float32")
            earlier = ops.cast(self.not_earlier, "float32") * self.same
            self.from_start = earlier @ log_decay
        if log_decay.shape[-1] == 1:
            # (b, n, h, c, c): the decay between each pair, summed pair by pair.
            between = ops.cumsum(ops.where(self.later, log_decay, 0.0), axis=3)
            self.decay = ops.exp(ops.where(self.not_earlier, between, _NOTHING))
        else:
            self.growth = ops.exp(-self.from_start)  # (b, n, h, c, k)

    def products(
        self, reader: Tensor, reader_start: Tensor, written: Tensor, own: bool = True
    ) -> Tensor:
        """Returns decayed products, of shape `(b, n, h, c, c)`, zero for later writes.

        `reader` and `written` are `(b, n, h, c, k)`, and `reader_start` is `reader`
        times the decay from the start of the chunk. If `own`, a token reads after its
        own decay and write, otherwise before.
        """
        if self.decay is not None:
            decay = self.decay if own else _delay(self.decay)
            products = (reader @ _transpose(written)) * decay
            return products if self.same is None else products * self.same
        products = reader_start @ _transpose(written * self.growth)
        products = ops.where(self.not_earlier if own else self.later, products, 0.0)
        return products if self.same is None else products * self.same


def _delay(x: Tensor) -> Tensor:
    """Moves each token's entry (axis 3) to the next token; the first gets zeros."""
    return ops.concatenate([ops.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=3)


def _transpose(x: Tensor) -> Tensor:
    return ops.swapaxes(x, -1, -2)


def _solve(
    strictly_lower: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """Solves `(1 - strictly_lower) x = right` for two right sides.

    Not `ops.solve_triangular`: on JAX (0.10) two of them that run at the same time wait
    for each other forever on a CPU of two cores.
    """
    size = static_size(strictly_lower, 3)
    if size is None or size == 1:
        # Only shapes count, or nothing was written before.
        return first, second
    whole = 2 ** (size - 1).bit_length()
    matrix = ops.reshape(strictly_lower, (-1, size, size))
    matrix = ops.pad(matrix, [[0, 0], [0, whole - size], [0, whole - size]])
    inverse = _inverse(matrix)[:, :size, :size]
    inverse = ops.reshape(inverse, ops.shape(strictly_lower))
    return inverse @ first, inverse @ second


def _inverse(strictly_lower: Tensor) -> Tensor:
    """Returns the inverse of `1 - strictly_lower`, `(count, size, size)`.

    The size is a power of two. Blocks on the diagonal are inverted first. Small ones are
    the sum of the powers of the matrix, `(1 + x)(1 + x^2)(1 + x^4)`; of larger ones the
    powers would cancel where tokens repeat.
    """
    size = strictly_lower.shape[-1]
    if size <= _SMALL:
        power = strictly_lower
        inverse = power + ops.eye(size, dtype="float32")
        for _ in range(2, size.bit_length()):
            power = power @ power
            inverse = inverse + power @ inverse
        return inverse
    half = size // 2
    corners = strictly_lower[:, :half, :half], strictly_lower[:, half:, half:]
    inverted = _inverse(ops.concatenate(corners, axis=0))
    upper, lower = ops.split(inverted, 2, axis=0)
    below = lower @ strictly_lower[:, half:, :half] @ upper
    upper = ops.concatenate([upper, ops.zeros_like(upper)], axis=2)
    return ops.concatenate([upper, ops.concatenate([below, lower], axis=2)], axis=1)


def _chunk_states(
    matrices: bool, transition: Tensor, added: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the state before each chunk, `(b, n, h, k, v)`, and after the last.

    Each chunk multiplies the state before it by `transition`, which holds matrices,
    `(b, n, h, k, k)`, or decays, `(b, n, h, k, 1)`, and adds `added`.
    """
    times = ops.matmul if matrices else ops.multiply

    def join(first: tuple, second: tuple) -> tuple:
        return times(second[0], first[0]), times(second[0], first[1]) + second[1]

    count = added.shape[1]
    if count is None:
        states = _scan_states(matrices, transition, added, state)
        return states[:, :-1], states[:, -1]
    transition, added = _associative_scan(join, (transition, added), count)
    after = times(transition, state[:, None]) + added
    before = ops.concatenate([state[:, None], after[:, :-1]], axis=1)
    return before, after[:, -1]


def _associative_scan(join: Callable, parts: tuple, count: int) -> tuple:
    """Joins each entry along axis 1 with all before it, in linear work.

    Not `ops.associative_scan`, which XLA can't compile on TensorFlow.
    """
    if count == 1:
        return parts
    pairs = join(
        tuple(x[:, 0 : count - 1 : 2] for x in parts),
        tuple(x[:, 1:count:2] for x in parts),
    )
    odd = _associative_scan(join, pairs, count // 2)
    # Even entries: the first as it is, others joined with all pairs before them.
    even = tuple(x[:, :1] for x in parts)
    others = (count - 1) // 2
    if others:  # XLA on TensorFlow has no gradient of a slice of nothing.
        later = join(
            tuple(x[:, :others] for x in odd),
            tuple(x[:, 2:count:2] for x in parts),
        )
        even = tuple(ops.concatenate(x, axis=1) for x in zip(even, later))
    return tuple(_interleave(x, y, count) for x, y in zip(even, odd))


def _interleave(even: Tensor, odd: Tensor, count: int) -> Tensor:
    both = ops.stack([even[:, : count // 2], odd], axis=2)
    both = ops.reshape(both, (-1, 2 * (count // 2), *both.shape[3:]))
    return both if count % 2 == 0 else ops.concatenate([both, even[:, -1:]], axis=1)


def _scan_states(
    matrices: bool, transition: Tensor, added: Tensor, state: Tensor
) -> Tensor:
    """Returns the state before each chunk and after the last, on TensorFlow.

    For graphs in which the number of chunks is not known before they run; the arguments
    are those of `_chunk_states`. The loop has a gradient of its own, as XLA can't
    differentiate a loop of unknown length: backwards, a linear recurrence is one with
    its transitions transposed.
    """
    import tensorflow as tf

    def times(transition: Tensor, state: Tensor, transpose: bool = False) -> Tensor:
        if matrices:
            return tf.matmul(transition, state, transpose_a=transpose)
        return transition * state

    def scan(transition: Tensor, added: Tensor, state: Tensor, back: bool) -> Tensor:
        def step(state: Tensor, chunk: tuple[Tensor, Tensor]) -> Tensor:
            return times(chunk[0], state, transpose=back) + chunk[1]

        return tf.scan(step, (transition, added), state, reverse=back)

    @tf.custom_gradient
    def run(transition: Tensor, added: Tensor, state: Tensor) -> tuple:
        after = scan(transition, added, state, back=False)
        states = tf.concat([state[None], after], axis=0)

        def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            before = scan(transition, upstream[:-1], upstream[-1], back=True)
            after = tf.concat([before[1:], upstream[-1:]], axis=0)
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
