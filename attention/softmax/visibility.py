"""Which key a query may attend to."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops

from attention.caches.cache_policy import CachePolicy
from attention.contract.padding import cut
from attention.contract.segments import same_segment
from attention.contract.sizes import sequence_length, static_size
from attention.contract.types import Mask, Tensor
from attention.positions.arithmetic import HIDDEN_POSITION, one_row_each

# With smaller blocks there are too many small products.
_MIN_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Visibility:
    """The rules that decide which keys a query may attend to.

    Attributes:
        query_positions: `int32` tensor `(query_length,)` or `(batch, query_length)`.
        key_positions: `int32` tensor of shape `(key_length,)` or `(batch, key_length)`.
        causal: bool. Whether keys at later positions are hidden.
        policy: `None` or a `CachePolicy`, which hides the keys that it drops.
        key_padding_mask: `None` or boolean tensor `(batch, key_length)`.
        attention_mask: `None` or boolean tensor `(batch, query_length,
            positions)`: its last axis counts positions of the sequence.
            Positions beyond its end are hidden.
        prefix_length: `None` or `int32` tensor, `()` or `(batch,)`: keys before
            this position are seen from before them, too.
        segment_ids: `None`, or a pair of integer tensors `(batch, query_length)`
            and `(batch, key_length)`: only keys of the query's own segment count.
        in_order: bool. Whether the positions of keys are 0, 1, 2 and so on,
            unless there is a row of them for each sequence.
    """

    query_positions: Tensor
    key_positions: Tensor
    causal: bool = True
    policy: CachePolicy | None = None
    key_padding_mask: Mask = None
    attention_mask: Mask = None
    prefix_length: Tensor = None
    segment_ids: tuple[Tensor, Tensor] | None = None
    in_order: bool = False

    @property
    def may_be_empty(self) -> bool:
        """Returns whether a real query may see no key."""
        masked = not self.causal and self.key_padding_mask is not None
        return masked or self.attention_mask is not None

    @property
    def hides_later_keys(self) -> bool:
        """Returns whether keys are the queries' tokens, and none sees a later one."""
        same = self.key_positions is self.query_positions
        return self.causal and self.prefix_length is None and same

    def mask(self) -> Tensor:
        """Returns a mask that broadcasts to `(batch, heads, queries, keys)`.

        It is `None` where every key may be attended.
        """
        masks = [x[None] if len(x.shape) == 2 else x for x in self._by_position()]
        if self.key_padding_mask is not None:
            masks.append(self.key_padding_mask[:, None, :])
        if self.attention_mask is not None:
            masks.append(_align(self.attention_mask, self.key_positions, self.in_order))
        if self.segment_ids is not None:
            masks.append(same_segment(*self.segment_ids))
        if not masks:
            return None
        combined = masks[0]
        for mask in masks[1:]:
            combined = ops.logical_and(combined, mask)
        return combined[:, None]

    def _by_position(self) -> list[Any]:
        keys = self.key_positions[..., None, :]
        queries = self.query_positions[..., :, None]
        visible = []
        if self.causal and self.prefix_length is None:
            visible.append(keys <= queries)
        elif self.causal:
            prefix = ops.cast(self.prefix_length, "int32")
            prefix = prefix[:, None, None] if len(prefix.shape) == 1 else prefix
            visible.append(ops.logical_or(keys <= queries, keys < prefix))
        kept = None if self.policy is None else self.policy.visible(queries, keys)
        return visible if kept is None else [*visible, kept]

    def in_blocks(self, blocks: Blocks, like: Tensor) -> Visibility:
        """Returns the rules for the blocks into which sequences are cut."""
        queries, keys = (
            one_row_each(x, like) for x in (self.query_positions, self.key_positions)
        )
        if self.key_padding_mask is not None:
            keys = ops.where(self.key_padding_mask, keys, HIDDEN_POSITION)
        segments = self.segment_ids
        if segments is not None:
            segments = (blocks.queries(segments[0]), blocks.keys(segments[1]))
        return dataclasses.replace(
            self,
            query_positions=blocks.queries(queries),
            key_positions=blocks.keys(keys, HIDDEN_POSITION),
            key_padding_mask=None,
            segment_ids=segments,
        )

    def blocks(self, query: Tensor, key: Tensor) -> Blocks | None:
        """Returns blocks outside of which nothing is seen; `None` if they save little."""
        if self.attention_mask is not None or self.prefix_length is not None:
            return None
        length = sequence_length(query)
        if isinstance(length, int):
            same = length == static_size(key, 1)
        else:
            same = self.key_positions is self.query_positions
        if length is None or not same:
            return None
        reach = None if self.policy is None else self.policy.reach
        size = _block_size(length, reach)
        return None if size is None else Blocks(size, length, self.causal)


def _align(attention_mask: Mask, key_positions: Tensor, in_order: bool) -> Tensor:
    """Returns the columns of `attention_mask` that belong to the keys."""
    attention_mask = ops.cast(attention_mask, "bool")
    length = static_size(attention_mask, len(attention_mask.shape) - 1)
    if length is None or length == 1:
        return attention_mask
    known = key_positions < length
    columns = ops.minimum(key_positions, length - 1)
    if len(key_positions.shape) == 2:
        found = ops.take_along_axis(attention_mask, columns[:, None], axis=-1)
        return ops.logical_and(found, known[:, None])
    if in_order and static_size(key_positions, 0) in (None, length):
        return attention_mask
    return ops.logical_and(ops.take(attention_mask, columns, axis=-1), known)


def _block_size(length: Any, window: int | None) -> Any:
    """Returns the size of blocks for sliding-window self-attention.

    It is at least the window, so that a block sees only its neighbours, and a tensor
    where `length` is one. `None` where blocks would save nothing.
    """
    if window is None:
        return None
    size = max(window, _MIN_BLOCK)
    if not isinstance(length, int):
        return ops.minimum(size, length)
    return size if length > 2 * size else None


class Blocks:
    """Arranges a batch of sequences as a larger batch of blocks of a size.

    The size and the length may be tensors. A block sees itself and the block before it,
    and if it is not causal the block after it.
    """

    def __init__(self, size: Any, length: Any, causal: bool) -> None:
        self.size, self.length, self.causal = size, length, causal
        self.count = -(-length // size)

    def queries(self, x: Tensor) -> Tensor:
        """Returns `(batch, length, ...)` as `(batch * blocks, size, ...)`."""
        return self._merge(cut(x, self.count, self.size))

    def keys(self, x: Tensor, fill: int = 0) -> Tensor:
        """Returns blocks with their neighbours: `(batch * blocks, 2 or 3 * size, ...)`.

        `fill` is the value before and after the sequence.
        """
        x = cut(x, self.count, self.size, fill)
        edge = ops.full_like(x[:, :1], fill)
        parts = [ops.concatenate([edge, x[:, :-1]], axis=1), x]
        if not self.causal:
            parts.append(ops.concatenate([x[:, 1:], edge], axis=1))
        return self._merge(ops.concatenate(parts, axis=2))

    def join(self, x: Tensor) -> Tensor:
        """Returns blocks of queries as `(batch, length, ...)` again."""
        x = ops.reshape(x, (-1, self.count * self.size, *x.shape[2:]))
        return x[:, : self.length]

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return ops.reshape(x, (-1, *ops.shape(x)[2:]))
