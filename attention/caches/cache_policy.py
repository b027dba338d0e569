"""The interface of cache policies: which past tokens are kept, and where."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import check_positive_int, describe
from attention.contract.sizes import static_size
from attention.contract.types import Cache, DType, Mask, Tensor
from attention.positions.arithmetic import (
    HIDDEN_POSITION,
    hide_padding,
    join_positions,
)


class CachePolicy:
    """Decides which tokens an attention layer keeps, and in which slots.

    A layer takes one as `cache_policy=`. Its cache is a dict of tensors, each with
    an axis of slots (see `token_axis`). A subclass defines the number of slots and the
    position that each of them holds; the rest follows:

    - `slots(max_length)`: how many slots sequences of this length need.
    - `positions(slots, index)`: the position in each slot after `index` tokens.
    - `visible(query_positions, key_positions)`: which keys a query sees. It must
      see no key that is not kept until then, with a cache or without.
    - `can_rewind(cache, from_index, to_index)`: whether tokens can be taken back.
    - `get_config()`, if it has arguments, so that layers can be saved.

    `create`, `write`, `read`, `stored`, `write_and_read` and `place_scores` are
    overridden for another layout, another dtype or more speed.

    Attributes:
        reach: int or `None`. No query sees a key that is so many positions away, so
            that a sequence without a cache is attended in blocks, in linear time.

    Example:

    A cache of the last `distance` tokens, and of every second token before them.

    >>> import keras, numpy as np
    >>> from keras import ops
    >>> from attention import CachePolicy, RotaryAttention
    >>> @keras.saving.register_keras_serializable("my_package")
    ... class ThinningCache(CachePolicy):
    ...     def __init__(self, distance):
    ...         self.distance = distance
    ...         self.recent = -(-distance // 2)  # slots of odd positions
    ...     def slots(self, max_length):
    ...         return self.recent + -(-max_length // 2)
    ...     def positions(self, slots, index):
    ...         even = 2 * ops.arange(slots - self.recent, dtype="int32")
    ...         even = ops.where(even < index[..., None], even, self.nowhere)
    ...         last = index[..., None] // 2 - 1  # the last odd position is 2 * last + 1
    ...         slot = ops.arange(self.recent, dtype="int32")
    ...         odd = last - ops.mod(last - slot, self.recent)
    ...         odd = ops.where(odd >= 0, 2 * odd + 1, self.nowhere)
    ...         return ops.concatenate([odd, even], axis=-1)
    ...     def visible(self, query_positions, key_positions):
    ...         near = key_positions > query_positions - self.distance
    ...         return ops.logical_or(near, key_positions % 2 == 0)
    ...     def can_rewind(self, cache, from_index, to_index):
    ...         return from_index <= 2 * self.recent or from_index - to_index <= 1
    ...     def get_config(self):
    ...         return {"distance": self.distance}
    >>> layer = RotaryAttention(num_heads=2, cache_policy=ThinningCache(4))
    >>> x = np.random.normal(size=(1, 9, 8)).astype("float32")
    >>> full = layer(x)
    >>> cache = layer.create_cache(batch_size=1, max_length=12)
    >>> cache["value"].shape[2]  # slots
    8
    >>> head, cache = layer(x[:, :8], cache=cache, cache_update_index=0)
    >>> tail, cache = layer(x[:, 8:], cache=cache, cache_update_index=8)
    >>> bool(ops.all(ops.isclose(tail, full[:, 8:], atol=1e-5)))
    True
    """

    reach: int | None = None
    # The position of a slot that holds no token.
    nowhere = HIDDEN_POSITION

    def slots(self, max_length: int) -> int:
        """Returns how many slots sequences of up to `max_length` tokens need."""
        raise NotImplementedError(f"{type(self).__name__} must implement `slots`.")

    def positions(self, slots: int, index: Tensor) -> Tensor:
        """Returns the position that each slot holds after `index` tokens.

        `index` is an `int32` tensor of shape `()` or `(batch,)`; the positions are
        one of shape `(slots,)` or `(batch, slots)`, `nowhere` for a slot without one.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `positions`.")

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Returns which keys a query sees, besides the rule that it sees no later ones.

        From `int32` tensors of shape `(..., query_length, 1)` and `(..., 1,
        key_length)` it computes a boolean one of shape `(..., query_length,
        key_length)`, or `None` where all are seen.
        """
        return None

    def can_rewind(self, cache: Cache, from_index: int, to_index: int) -> bool:
        """Returns whether the last tokens can be taken back; see `CachedLayer`."""
        return False

    def create(
        self,
        batch_size: int,
        max_length: int,
        sizes: dict[str, tuple[int, int]],
        dtype: str,
    ) -> dict[str, Any]:
        """Returns an empty cache: a dict of zero tensors of a dtype.

        `sizes` is a dict from the name of each tensor to `(heads, dim)`.
        """
        batch_size = check_positive_int("batch_size", batch_size)
        slots = self.slots(check_positive_int("max_length", max_length))
        cache = {}
        for name, (heads, dim) in sizes.items():
            shape = (slots, dim) if token_axis(name) == 2 else (dim, slots)
            cache[name] = ops.zeros((batch_size, heads, *shape), dtype=dtype)
        return cache

    def write(
        self, cache: Cache, new: dict[str, Tensor], index: Tensor, padding_mask: Mask
    ) -> dict[str, Any]:
        """Writes new tokens after the first `index` ones.

        Args:
            cache: as created.
            new: dict of tensors laid out as the cache's.
            index: int, or integer tensor of shape `()` or `(batch,)`.
            padding_mask: `None` or boolean tensor of shape `(batch, new)`. Padded
                tokens are not written over a slot that is in use.

        Raises:
            ValueError: if the new tokens can't fit, as far as that is known.
        """
        name = next(iter(new))
        count = ops.shape(new[name])[token_axis(name)]
        if padding_mask is not None:
            # Padding is on the right.
            count = ops.sum(ops.cast(padding_mask, "int32"), axis=-1)
        index = ops.cast(index, "int32")
        positions = self.positions(self.num_slots(cache), index + count)
        # Which of the new tokens each slot takes: (slots,) or (batch, slots).
        source = positions - index[..., None]
        is_new = ops.logical_and(source >= 0, positions < HIDDEN_POSITION)
        return {
            name: _take_tokens(cache[name], x, source, is_new, token_axis(name))
            for name, x in new.items()
        }

    def read(self, cache: Cache, dtype: DType) -> dict[str, Any]:
        """Returns the contents of the slots in the dtype that was written.

        Empty slots are zeros.
        """
        return cache

    def stored(self, new: Tensor) -> Tensor:
        """Returns a tensor `(..., dim)` as it would be read after it was written."""
        return new

    def num_slots(self, cache: Cache) -> int:
        """Returns how many slots a cache has."""
        name, tensor = next(iter(cache.items()))
        return tensor.shape[token_axis(name)]

    def write_and_read(
        self,
        cache: Cache,
        new: dict,
        index: Tensor,
        positions: Tensor,
        padding_mask: Mask,
    ) -> tuple[Any, Any, Any]:
        """Writes new tokens as `write` does, and returns all that they may attend to.

        These are the slots as they were and the new tokens after them, as the first
        new token sees what the last has overwritten. `positions` are those of the new
        tokens, `(new,)` or `(batch, new)`.

        Returns:
            The updated cache; a dict of what is seen; and the positions of that.
        """
        positions = hide_padding(positions, padding_mask)
        # Copied before it is written, which on torch may be in place.
        seen = {
            name: ops.concatenate([cache[name], x], axis=token_axis(name))
            for name, x in new.items()
        }
        past = self.positions(self.num_slots(cache), ops.cast(index, "int32"))
        positions = join_positions(past, positions)
        return self.write(cache, new, index, padding_mask), seen, positions

    def place_scores(
        self, cache: Cache, past: Tensor, new: Tensor, index: Tensor, padding_mask: Mask
    ) -> Tensor:
        """Returns attention weights of the slots as they were and of new tokens.

        Both are of shape `(batch, heads, queries, tokens)`; `past` may be `None`. The
        rest is as for `write`.
        """
        if past is None:
            past = ops.zeros((*ops.shape(new)[:3], self.num_slots(cache)), new.dtype)
        return ops.concatenate([past, new], axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CachePolicy:
        """Returns a policy from the dict that `get_config` returned."""
        return cls(**config)


def token_axis(name: str) -> int:
    """Returns the axis of the tokens in a tensor of a cache, by its name.

    Keys are laid out `(batch, heads, dim, length)` and all else `(batch, heads, length,
    dim)`, so that no matrix has to be transposed in a decode step.
    """
    return 3 if name.startswith("key") else 2


def to_cache_layout(new: dict[str, Tensor]) -> dict[str, Any]:
    """Returns tensors of shape `(batch, length, heads, dim)` laid out as a cache's."""
    return {
        name: ops.transpose(x, (0, 2, 3, 1) if token_axis(name) == 3 else (0, 2, 1, 3))
        for name, x in new.items()
    }


def check_cache_policy(
    policy: Any, window: int | None = None, cache_dtype: str | None = None
) -> Any:
    """Returns a given policy or `None`, and checks that no two arguments name one."""
    if isinstance(policy, dict):
        policy = keras.saving.deserialize_keras_object(policy)
    if cache_dtype not in (None, "int8"):
        raise ValueError(
            "`cache_dtype` must be None, which means the compute dtype, or 'int8'. "
            f"Received: cache_dtype={describe(cache_dtype)}"
        )
    if policy is None:
        return None
    if not isinstance(policy, CachePolicy):
        raise TypeError(
            "`cache_policy` must be a cache policy: `FullCache()`, `RingCache(window)`, "
            "`QuantizedCache(policy)` or another subclass of `CachePolicy`. Received: "
            f"cache_policy={describe(policy)}"
        )
    if window is not None or cache_dtype is not None:
        raise ValueError(
            "`cache_policy` decides which tokens are kept, so `window` and `cache_dtype` "
            "can't be given with it: `QuantizedCache(RingCache(window))` is both. "
            f"Received: cache_policy={describe(policy)}, window={window}, "
            f"cache_dtype={describe(cache_dtype)}"
        )
    return policy


def _take_tokens(
    cache: Cache, new: Tensor, source: Tensor, is_new: Tensor, axis: int
) -> Tensor:
    """Lets each slot take the new token `source` where `is_new`, or keep what it holds.

    Both are of shape `(slots,)` or `(batch, slots)`; `axis` is that of the tokens.
    """
    source = ops.clip(source, 0, ops.shape(new)[axis] - 1)
    if len(source.shape) == 1:
        is_new = is_new[:, None] if axis == 2 else is_new
        return ops.where(is_new, ops.take(new, source, axis=axis), cache)
    source, is_new = (
        x[:, None, :, None] if axis == 2 else x[:, None, None, :]
        for x in (source, is_new)
    )
    shape = list(ops.shape(new))
    shape[axis] = static_size(cache, axis)
    taken = ops.take_along_axis(new, ops.broadcast_to(source, shape), axis=axis)
    return ops.where(is_new, taken, cache)
