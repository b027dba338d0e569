"""Draws a token for each row, by numbers of the row: temperature, top-k, top-p, seed."""

from __future__ import annotations

import math

from keras import ops

from attention.contract import Tensor

# Of Threefry-2x32, which has 20 rounds.
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
# Logits that are further below the largest one have no chance in float32.
_LOWEST = -110.0
# Of that range: then it is smaller than the distance of most floats.
_HALVINGS = 36


def filter_logits(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Returns logits with -inf for the tokens that may not be drawn.

    The filters follow each other: the `top_k` likeliest tokens (0 means all); of these
    the likeliest whose probabilities together reach `top_p`; of these the ones at least
    `min_p` times as likely as the likeliest.

    Args:
        logits: `float32` tensor `(rows, vocabulary_size)`, divided by the temperature.
        top_k: `int32` tensor `(rows,)`.
        top_p: `float32` tensor `(rows,)`.
        min_p: `float32` tensor `(rows,)`.

    Reference:

    - [Holtzman et al., 2019](https://arxiv.org/abs/1904.09751)
    - [Nguyen et al., 2024](https://arxiv.org/abs/2407.01082)
    """
    filters = ops.logical_or(ops.logical_or(top_k > 0, top_p < 1), min_p > 0)
    return ops.cond(
        ops.any(filters),
        lambda: _filtered(logits, top_k, top_p, min_p),
        lambda: logits,
    )


def _filtered(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    size = logits.shape[-1]
    shifted = logits - ops.max(logits, axis=-1, keepdims=True)
    shifted = ops.maximum(shifted, _LOWEST)
    weights = ops.exp(shifted)
    count = ops.cast(ops.where(top_k > 0, top_k, size), "float32")
    kept = _less_above(shifted, ops.ones_like(shifted), count)
    weights = ops.where(kept, weights, 0.0)
    likeliest = _less_above(shifted, weights, top_p * ops.sum(weights, axis=-1))
    likeliest = ops.logical_or(likeliest, top_p[:, None] >= 1)
    kept = ops.logical_and(kept, likeliest)
    kept = ops.logical_and(kept, weights >= min_p[:, None])
    return ops.where(kept, logits, -math.inf)


def _less_above(values: Tensor, weights: Tensor, limit: Tensor) -> Tensor:
    """Returns where the weights of all larger values together are less than a limit.

    `values`, at most 0, and `weights` are of shape `(rows, size)`, and `limit` of shape
    `(rows,)`. The least such value is found by halving: to sort a vocabulary takes 10 to 20
    times as long.
    """
    low = ops.full_like(values[:, 0], 1.01 * _LOWEST)

    def halve(_: Tensor, bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        low, high = bounds
        middle = (low + high) / 2
        above = ops.where(values > middle[:, None], weights, 0.0)
        less = ops.sum(above, axis=-1) < limit
        return ops.where(less, low, middle), ops.where(less, middle, high)

    low, _ = ops.fori_loop(0, _HALVINGS, halve, (low, ops.zeros_like(low)))
    return values > low[:, None]


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draws a token for each row, by a number between 0 and 1.

    Args:
        logits: `float32` tensor `(rows, vocabulary_size)`.
        numbers: `float32` tensor `(rows,)`, uniform in (0, 1).

    Returns:
        `int32` tensor `(rows,)`. A token whose logit is -inf is never drawn.
    """
    chances = ops.softmax(logits, axis=-1)
    reached = ops.cumsum(chances, axis=-1)
    wanted = numbers[:, None] * ops.max(reached, axis=-1, keepdims=True)
    found = ops.logical_and(reached > wanted, chances > 0)
    likeliest = ops.argmax(chances, axis=-1)
    token = ops.argmax(ops.cast(found, "int32"), axis=-1)
    # Rounding may leave none.
    token = ops.where(ops.any(found, axis=-1), token, likeliest)
    return ops.cast(token, "int32")


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Returns a random number for each row, of its seed and a position alone.

    Backends' own generators draw the numbers of a whole batch: a row's would depend on the
    batch that it is in.

    Args:
        seeds: `int32` tensor `(rows, 2)`, the 64 bits of a key.
        positions: `int32` tensor `(rows,)`.

    Returns:
        `float32` tensor `(rows,)`, uniform in (0, 1).
    """
    bits, _ = threefry(
        (seeds[:, 0], seeds[:, 1]), (positions, ops.zeros_like(positions))
    )
    # 23 bits are exact in float32; between two of them is neither 0 nor 1.
    return (ops.cast(_shifted_right(bits, 9), "float32") + 0.5) * 2.0**-23


def threefry(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns the random bits of Threefry-2x32, as two `int32` tensors.

    Reference:

    - [Salmon et al., 2011](https://doi.org/10.1145/2063384.2063405)
    """
    parity = ops.bitwise_xor(ops.bitwise_xor(*key), _PARITY)
    keys = (*key, parity)
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[4 * (group % 2) :][:4]:
            a = a + b
            rotated = ops.bitwise_or(
                ops.bitwise_left_shift(b, rotation), _shifted_right(b, 32 - rotation)
            )
            b = ops.bitwise_xor(rotated, a)
        a = a + keys[(group + 1) % 3]
        b = b + keys[(group + 2) % 3] + (group + 1)
    return a, b


def _shifted_right(bits: Tensor, count: int) -> Tensor:
    """Returns `int32` bits shifted to the right, with zeros from the left."""
    shifted = ops.bitwise_right_shift(bits, count)
    return ops.bitwise_and(shifted, (1 << (32 - count)) - 1)
