"""The cache of a sliding window: as many slots as the window has positions."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.caches.full_cache import KEY_VALUE_AXES, FullCache
from attention.caches.writes import write_tokens
from attention.contract.arguments import check_positive_int
from attention.positions.arithmetic import HIDDEN_POSITION, join_positions


class RingCache(FullCache):
    """Keeps the last `window` positions, each in slot `position % window`.

    Which position a slot holds follows from how many were absorbed, so nothing
    else is stored, and the cache never grows.

    Args:
        window: int. How many positions a query sees, itself included.
        axes: as for `FullCache`.
    """

    def __init__(self, window: int, axes: dict[str, int] = KEY_VALUE_AXES) -> None:
        super().__init__(axes)
        self.window = check_positive_int("window", window)

    def slots(self, max_length: int) -> int:
        """As many as the window has positions, however long the sequence."""
        return self.window

    def write(
        self, cache: Any, new: dict[str, Any], index: Any, padding_mask: Any
    ) -> dict[str, Any]:
        """Writes the new tokens that are still seen by the next one.

        Arguments and results are those of `FullCache.write`; any number of tokens
        fits.
        """
        write = self._write_one if self._count(new) == 1 else self._write_many
        return {
            name: write(cache[name], new[name], index, padding_mask, axis)
            for name, axis in self.axes.items()
        }

    def _write_one(
        self, cache: Any, update: Any, index: Any, padding_mask: Any, axis: int
    ) -> Any:
        """Writes one token to its slot, and touches no other."""
        if isinstance(index, int) and padding_mask is None:
            slot: Any = index % self.window
        else:
            # Here the slot behind the index is live, so padding must not be written
            # there: only at an index in a tensor does `write_tokens` heed that.
            slot = ops.mod(ops.cast(index, "int32"), self.window)
        return write_tokens(cache, update, slot, padding_mask, axis)

    def _write_many(
        self, cache: Any, update: Any, index: Any, padding_mask: Any, axis: int
    ) -> Any:
        """Lets every slot take the last of the new tokens that belongs there."""
        count = new = ops.shape(update)[axis]
        if padding_mask is not None:
            # Padding is on the right.
            count = ops.sum(ops.cast(padding_mask, "int32"), axis=-1)
        index = ops.cast(index, "int32")
        source = self._last_positions(index + count) - index[..., None]
        is_new = source >= 0
        source = ops.clip(source, 0, new - 1)
        if len(source.shape) == 1:
            taken = ops.take(update, source, axis=axis)
            is_new = is_new[:, None] if axis == 2 else is_new
            return ops.where(is_new, taken, cache)
        source, is_new = (
            x[:, None, :, None] if axis == 2 else x[:, None, None, :]
            for x in (source, is_new)
        )
        shape = list(ops.shape(update))
        shape[axis] = self.window
        taken = ops.take_along_axis(update, ops.broadcast_to(source, shape), axis=axis)
        return ops.where(is_new, taken, cache)

    def _last_positions(self, index: Any) -> Any:
        """The last position before `index` of each slot; negative: there is none.

        Args:
            index: `int32` tensor of shape `()` or `(batch,)`.

        Returns:
            An `int32` tensor of shape `(window,)` or `(batch, window)`.
        """
        last = index[..., None] - 1
        slots = ops.arange(self.window, dtype="int32")
        return last - ops.mod(last - slots, self.window)

    def positions(self, cache: Any, index: Any) -> Any:
        """The positions of the slots; see `FullCache.positions`."""
        positions = self._last_positions(ops.cast(index, "int32"))
        return ops.where(positions >= 0, positions, HIDDEN_POSITION)

    def write_and_read(
        self, cache: Any, new: dict, index: Any, positions: Any, mask: Any
    ) -> tuple[Any, Any, Any]:
        """Writes, and returns the slots as they were and the new tokens behind them.

        The first of several new tokens sees what the last has overwritten.
        """
        if mask is not None:
            positions = ops.where(mask, positions, HIDDEN_POSITION)
        # Copied before it is written, which on torch may be in place.
        seen = {
            name: ops.concatenate([cache[name], new[name]], axis=axis)
            for name, axis in self.axes.items()
        }
        positions = join_positions(self.positions(cache, index), positions)
        return self.write(cache, new, index, mask), seen, positions

    def place_scores(
        self, cache: Any, past: Any, new: Any, index: Any, padding_mask: Any
    ) -> Any:
        """Returns the scores of the slots, as they were, and of the new tokens."""
        if past is None:
            past = ops.zeros((*ops.shape(new)[:3], self.window), dtype=new.dtype)
        return ops.concatenate([past, new], axis=-1)

    def can_rewind(self, cache: Any, from_index: int, to_index: int) -> bool:
        """Until a position is dropped that is seen again from `to_index` on."""
        return from_index <= self.window or from_index - to_index <= 1
