"""Attention that keeps no matrix of queries and keys for its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from attention.contract.sizes import static_size
from attention.contract.types import Mask, Tensor
from attention.softmax.kernels import masked_softmax, matmul_to_float32

# With fewer queries products are too small to be fast; with more chunks there is too
# much to compile.
_MIN_QUERIES, _MAX_CHUNKS = 128, 8


class _Chunk(NamedTuple):
    """Queries from `start` to `stop`, which see all keys but the last `unseen` ones."""

    start: int
    stop: int | None
    unseen: int

    def queries(self, x: Tensor) -> Tensor:
        """Returns them of `(batch, groups, group_size, length, dim)`, as a matrix."""
        x = x[:, :, :, self.start : self.stop]
        rows = x.shape[2] * ops.shape(x)[3]
        return ops.reshape(x, (-1, x.shape[1], rows, x.shape[4]))

    def keys(self, x: Tensor) -> Tensor:
        """Returns the keys or values that they see, `(batch, groups, seen, dim)`."""
        return x[:, :, : -self.unseen] if self.unseen else x

    def among_all(self, x: Tensor) -> Tensor:
        """Returns what belongs to these keys, with zeros for those that are unseen."""
        return ops.pad(x, ((0, 0), (0, 0), (0, self.unseen), (0, 0)))

    def mask(self, mask: Tensor) -> Tensor:
        """Returns the part of a mask, `(batch, 1, 1 or length, key_length)`."""
        if mask.shape[2] != 1:
            mask = mask[:, :, self.start : self.stop]
        return mask[..., : -self.unseen] if self.unseen else mask


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, causal: bool
) -> Tensor:
    """Computes attention a few queries at a time, and each again for the gradient.

    So there is never a matrix of all queries and keys, and nothing of it is kept. Where
    no query sees a later key, half of the products are left out. Heads that share keys
    and values are computed as one matrix; nothing is repeated.

    Args:
        query: tensor of shape `(batch, length, num_heads, key_dim)`.
        key: tensor of shape `(batch, key_length, groups, key_dim)`.
        value: tensor of shape `(batch, key_length, groups, value_dim)`.
        mask: `None`, or boolean tensor `(1 or batch, 1, 1 or length,
            key_length)`.
        scale: float. The factor of the products.
        causal: bool. Whether there are as many keys as queries, and no query sees a key
            with a larger index than its own.

    Returns:
        A tensor of shape `(batch, length, num_heads, value_dim)`.

    References:

    - [Rabe and Staats, 2021](https://arxiv.org/abs/2112.05682)
    - [Dao et al., 2022](https://arxiv.org/abs/2205.14135) (the gradient)
    """
    groups, group_size = key.shape[2], query.shape[2] // key.shape[2]
    length = ops.shape(query)[1]
    chunks = _cut(static_size(query, 1), causal)

    def weigh(query: Tensor, key: Tensor, masks: tuple, chunk: _Chunk) -> Tensor:
        logits = matmul_to_float32(query, ops.swapaxes(key, 2, 3))
        if not masks:
            return masked_softmax(logits, None)
        (mask,) = masks
        rows, keys = ops.shape(logits)[2:]
        by_head = (-1, groups * group_size, rows // group_size, keys)
        weights = masked_softmax(ops.reshape(logits, by_head), chunk.mask(mask))
        return ops.reshape(weights, (-1, groups, rows, keys))

    def join(parts: list[Tensor]) -> Tensor:
        """Returns matrices as `(batch, groups, group_size, length, dim)`."""
        by_head = [
            ops.reshape(
                x, (-1, groups, group_size, ops.shape(x)[2] // group_size, x.shape[3])
            )
            for x in parts
        ]
        return ops.concatenate(by_head, axis=3)

    @ops.custom_gradient
    def attend(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Any:
        parts = []
        for chunk in chunks:
            weights = weigh(chunk.queries(query), chunk.keys(key), masks, chunk)
            parts.append(ops.matmul(ops.cast(weights, value.dtype), chunk.keys(value)))
        outputs = join(parts)

        def gradients(*arguments: Tensor, upstream: Any = None) -> tuple:
            given = arguments[0] if upstream is None else upstream
            of_query, of_key, of_value = [], 0, 0
            for chunk in chunks:
                queries, errors, found = map(chunk.queries, (query, given, outputs))
                keys, values = chunk.keys(key), chunk.keys(value)
                weights = weigh(queries, keys, masks, chunk)
                of_weights = matmul_to_float32(errors, ops.swapaxes(values, 2, 3))
                products = ops.cast(errors, "float32") * ops.cast(found, "float32")
                of_weights = of_weights - ops.sum(products, axis=-1, keepdims=True)
                of_logits = ops.cast(weights * of_weights, key.dtype)
                of_query.append(ops.matmul(of_logits, keys))
                part = ops.matmul(ops.swapaxes(of_logits, 2, 3), queries)
                of_key = of_key + chunk.among_all(part)
                weights = ops.cast(weights, value.dtype)
                part = ops.matmul(ops.swapaxes(weights, 2, 3), errors)
                of_value = of_value + chunk.among_all(part)
            return join(of_query), of_key, of_value, *(None for _ in masks)

        return outputs, gradients

    query = ops.reshape(query * scale, (-1, length, groups, group_size, key.shape[3]))
    outputs = attend(
        ops.transpose(query, (0, 2, 3, 1, 4)),
        ops.transpose(key, (0, 2, 1, 3)),
        ops.transpose(value, (0, 2, 1, 3)),
        # An argument: JAX computes it again where a block is computed again.
        *(() if mask is None else (mask,)),
    )
    outputs = ops.transpose(outputs, (0, 3, 1, 2, 4))
    return ops.reshape(outputs, (-1, length, groups * group_size, value.shape[3]))


def _cut(length: int | None, causal: bool) -> list[_Chunk]:
    if length is None:
        return [_Chunk(0, None, 0)]
    size = max(_MIN_QUERIES, -(-length // _MAX_CHUNKS))
    stops = [min(start + size, length) for start in range(0, length, size)]
    starts = [0, *stops]
    return [_Chunk(x, y, length - y if causal else 0) for x, y in zip(starts, stops)]
