"""The state of a generation, and the sizes its caches come in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

# Caches have few sizes, as each is compiled: this one doubled and doubled again,
# then two to an octave, so that little is attended that is not filled. An
# eighth more than a power of two, as that is what prompts are often cut to.
MIN_CAPACITY = 144
# Prompts are absorbed in chunks, a power of two of about a fourth of the
# capacity, so that little is computed for padding. More tokens at once than the last
# of these make products no faster, but attend to more keys that the causal mask hides.
MIN_CHUNK = 32
MAX_CHUNK = 512
MAX_CHUNK_TOKENS = 1024


class GenerationState(NamedTuple):
    """Where a generation stands: all that the next step needs besides weights.

    It is a pytree: it goes through `jax.jit`, `tf.function`, `keras.tree` and
    loops of any backend. Made by `CausalLM.prefill`, moved on by
    `CausalLM.decode_step`.

    Attributes:
        cache: a tuple with the cache of each call of a cached layer.
        cache_update_index: `int32` tensor of shape `(batch,)`: how many
            positions of each row the cache has absorbed.
        logits: tensor of shape `(batch, vocabulary_size)`: of the next token.
        max_length: `int32` scalar tensor: how many positions each row can have.
    """

    cache: tuple
    cache_update_index: Any
    logits: Any
    max_length: Any


def round_up_capacity(length: int) -> int:
    """The smallest size of a cache that holds `length` positions.

    Args:
        length: int.

    Returns:
        An int.

    Example:

    >>> from blocks.generation.state import round_up_capacity
    >>> [round_up_capacity(n) for n in (1, 129, 513, 769, 1025)]
    [144, 144, 576, 864, 1152]
    """
    capacity = MIN_CAPACITY
    while capacity < length:
        half = capacity * 3 // 2
        if capacity >= 4 * MIN_CAPACITY and length <= half:
            return half
        capacity *= 2
    return capacity


def chunk_length(batch_size: int, capacity: int) -> int:
    """How many tokens of each row are absorbed at once.

    Args:
        batch_size: int. The number of rows.
        capacity: int. The size of the cache.

    Returns:
        An int.
    """
    chunk = MIN_CHUNK
    while (
        2 * chunk <= min(capacity // 4, MAX_CHUNK)
        and 2 * chunk * batch_size <= MAX_CHUNK_TOKENS
    ):
        chunk *= 2
    return min(chunk, capacity)


def copy_cache(cache: Any) -> Any:
    """Copies a cache, so that one may be donated and the other still be used."""
    return tree.map_structure(ops.copy, cache)


def take_rows(cache: Any, rows: Any) -> Any:
    """Picks rows of a cache, or of anything else whose first axis is the batch."""
    rows = np.asarray(rows, "int32")
    return tree.map_structure(lambda x: ops.take(x, rows, axis=0), cache)


def join_rows(caches: list[Any], order: Any) -> Any:
    """Puts the rows of several caches into one, in the order that is given."""

    def join(*parts: Any) -> Any:
        return ops.take(ops.concatenate(parts, axis=0), order, axis=0)

    order = np.asarray(order, "int32")
    return tree.map_structure(join, *caches)
