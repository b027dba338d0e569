"""Which key a query may attend to."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops

from attention.caches.cache_policy import CachePolicy
from attention.contract.arguments import describe
from attention.contract.sizes import sequence_length, static_size
from attention.contract.types import Mask, Tensor
from attention.positions.arithmetic import HIDDEN_POSITION, one_row_each
from attention.softmax.banded import Blocks, block_size


@dataclasses.dataclass(frozen=True)
class Visibility:
    """The rules that decide which keys a query may attend to.

    Attributes:
        query_positions: `int32` tensor of shape `(query_length,)` or `(batch,
            query_length)`.
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
            and `(batch, key_length)`: only keys of the query's own segment are
            seen.
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
            queries, keys = self.segment_ids
            masks.append(queries[:, :, None] == keys[:, None, :])
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
        size = block_size(length, reach)
        return None if size is None else Blocks(size, length, self.causal)


def check_attention_mask(attention_mask: Mask, query: Tensor, keys: Tensor) -> None:
    """Raises an error if an attention mask does not fit the queries and keys.

    `keys` is `None` where a cache holds them: the mask may then have any number of
    columns. Masks of a floating dtype are refused with a `TypeError`: they are added to
    logits elsewhere, where zero means that a key is seen.
    """
    if attention_mask is None:
        return
    dtype = str(getattr(attention_mask, "dtype", "unknown"))
    if "bool" not in dtype and "int" not in dtype:
        raise TypeError(
            "`attention_mask` must be boolean: true where a query may attend to a "
            f"key. Received: attention_mask={describe(attention_mask)}. Turn a mask "
            "that is added to logits into one with `mask == 0`."
        )
    wanted = [(1, static_size(query, 0)), (1, static_size(query, 1))]
    if keys is not None:
        wanted.append((1, static_size(keys, 1)))
    sizes = [static_size(attention_mask, axis) for axis in range(3)]
    if len(attention_mask.shape) != 3 or any(
        None not in (size, *fitting) and size not in fitting
        for size, fitting in zip(sizes, wanted)
    ):
        raise ValueError(
            "`attention_mask` must be of shape (batch, query_length, key_length). "
            f"Received: attention_mask={describe(attention_mask)}, query="
            f"{describe(query)}, keys={describe(keys)}"
        )


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
