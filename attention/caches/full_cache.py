"""The cache policy that keeps all positions."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.caches.writes import write_tokens
from attention.contract.arguments import check_positive_int
from attention.contract.sizes import static_size
from attention.positions.arithmetic import HIDDEN_POSITION

# The axis of the tokens in each tensor of a cache of keys and values.
KEY_VALUE_AXES = {"key": 3, "value": 2}


class FullCache:
    """Keeps what is stored of every position, in the slot of its number.

    What is stored, the layer says: tensors by name, each laid out `(batch, heads,
    length, dim)` or `(batch, heads, dim, length)`. Keys are laid out the second
    way and values the first: a decode step multiplies a matrix that lies in memory
    as it is read, for which neither XLA nor a CPU's kernels have to transpose it.

    Args:
        axes: dict from the name of each tensor to the axis of its tokens, 2 or 3.
    """

    def __init__(self, axes: dict[str, int] = KEY_VALUE_AXES) -> None:
        self.axes = dict(axes)

    def create(
        self,
        batch_size: int,
        max_length: int,
        sizes: dict[str, tuple[int, int]],
        dtype: str,
    ) -> dict[str, Any]:
        """Returns a dict of zero tensors.

        Args:
            batch_size: int.
            max_length: int.
            sizes: dict from each name to `(heads, dim)`.
            dtype: of the tensors.
        """
        batch_size = check_positive_int("batch_size", batch_size)
        slots = self.slots(check_positive_int("max_length", max_length))
        cache = {}
        for name, (heads, dim) in sizes.items():
            shape = (slots, dim) if self.axes[name] == 2 else (dim, slots)
            cache[name] = ops.zeros((batch_size, heads, *shape), dtype=dtype)
        return cache

    def slots(self, max_length: int) -> int:
        """How many slots sequences of up to `max_length` positions need."""
        return max_length

    def capacity(self, cache: Any) -> int:
        """How many slots a cache has."""
        name, axis = next(iter(self.axes.items()))
        return cache[name].shape[axis]

    def write(
        self, cache: Any, new: dict[str, Any], index: Any, padding_mask: Any
    ) -> dict[str, Any]:
        """Writes new tokens behind the `index` absorbed positions.

        Args:
            cache: as created.
            new: dict of tensors laid out as the cache's.
            index: int, or integer tensor of shape `()` or `(batch,)`.
            padding_mask: `None` or boolean tensor of shape `(batch, new)`.
                Padded tokens are not written over a live slot.

        Returns:
            The updated cache.

        Raises:
            ValueError: if the new positions can't fit, where that is known
                without looking into a tensor.
        """
        capacity, count = self.capacity(cache), self._count(new)
        if count is not None and count > capacity:
            raise ValueError(
                f"{count} tokens were given to a cache of {capacity} positions. "
                "Create it with a larger `max_length`, or grow it with "
                "`grow_cache`."
            )
        known = isinstance(index, int) and count is not None
        if known and padding_mask is None and index + count > capacity:
            raise ValueError(
                f"{count} tokens at cache_update_index={index} do not fit "
                f"into a cache of {capacity} positions. Create it with a "
                "larger `max_length`, or grow it with `grow_cache`."
            )
        return {
            name: write_tokens(cache[name], new[name], index, padding_mask, axis)
            for name, axis in self.axes.items()
        }

    def _count(self, new: dict[str, Any]) -> int | None:
        name, axis = next(iter(self.axes.items()))
        return static_size(new[name], axis)

    def read(self, cache: Any, dtype: Any) -> dict[str, Any]:
        """Returns what was stored, zeros where nothing was.

        Args:
            cache: as created.
            dtype: the dtype of what was written, and of what is returned.
        """
        return cache

    def as_stored(self, new: Any) -> Any:
        """What would be read of a tensor whose last axis is `dim`."""
        return new

    def positions(self, cache: Any, index: Any) -> Any:
        """The positions of the slots.

        Args:
            cache: as created.
            index: int, or integer tensor of shape `()` or `(batch,)`: how many
                positions were absorbed. Other slots are at `HIDDEN_POSITION`.

        Returns:
            An `int32` tensor of shape `(slots,)` or `(batch, slots)`.
        """
        positions = ops.arange(self.capacity(cache), dtype="int32")
        index = ops.cast(index, "int32")[..., None]
        return ops.where(positions < index, positions, HIDDEN_POSITION)

    def write_and_read(
        self, cache: Any, new: dict, index: Any, positions: Any, mask: Any
    ) -> tuple[Any, Any, Any]:
        """Writes new tokens, and returns all that they may attend to.

        Args:
            cache: as created.
            new: as for `write`.
            index: as for `write`.
            positions: `int32` tensor `(new,)` or `(batch, new)`: those of the new
                tokens.
            mask: `None` or boolean tensor `(batch, new)`: which of them are real.

        Returns:
            The updated cache, what it holds, and the positions of that.
        """
        written = self.write(cache, new, index, mask)
        positions = ops.arange(self.capacity(cache), dtype="int32")
        return written, written, positions

    def place_scores(
        self, cache: Any, past: Any, new: Any, index: Any, padding_mask: Any
    ) -> Any:
        """Puts attention weights where the keys they belong to are in the cache.

        Args:
            cache: as created.
            past: `None`, or tensor `(batch, heads, queries, slots)`: the weights
                of what was in the cache.
            new: tensor `(batch, heads, queries, new)`: those of the new tokens.
            index: as for `write`.
            padding_mask: as for `write`.

        Returns:
            A tensor of shape `(batch, heads, queries, slots)`.
        """
        if past is None:
            shape = (*ops.shape(new)[:3], self.capacity(cache))
            past = ops.zeros(shape, dtype=new.dtype)
        return write_tokens(past, new, index, padding_mask, axis=3)

    def can_rewind(self, cache: Any, from_index: int, to_index: int) -> bool:
        """Slots behind the index are hidden, and overwritten before they are seen."""
        return True
