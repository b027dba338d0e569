"""The arithmetic of heads of recurrent mixers."""

from __future__ import annotations

from keras import ops

from attention.contract.types import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Returns `(batch, length, heads * dim)` as `(batch, length, heads, dim)`."""
    return ops.reshape(x, (*ops.shape(x)[:2], heads, x.shape[-1] // heads))


def join_heads(x: Tensor) -> Tensor:
    """Returns `(batch, length, heads, dim)` as `(batch, length, heads * dim)`."""
    return ops.reshape(x, (*ops.shape(x)[:2], x.shape[2] * x.shape[3]))


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Repeats each of `(batch, length, heads, dim)` so many times in a row."""
    return x if times == 1 else ops.repeat(x, times, axis=2)


def float32(x: Tensor) -> Tensor:
    """Casts to float32, in which decays and rates are computed."""
    return ops.cast(x, "float32")


def gate_heads(heads: Tensor, gate: Tensor) -> Tensor:
    """Joins heads and multiplies them by SiLU of a gate, in float32.

    What is read from a state may be larger than float16's largest number.
    """
    return join_heads(heads) * ops.silu(float32(gate))


def unit_length(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Scales vectors along the last axis to length 1, in float32."""
    x = float32(x)
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + epsilon)
