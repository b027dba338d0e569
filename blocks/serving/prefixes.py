"""Beginnings that prompts share, such as a system prompt, processed once."""

from __future__ import annotations

import collections

import numpy as np
from keras import ops, tree

from attention.contract import Cache
from blocks.generation.prompts import common_length

# Shorter beginnings are not worth a copy of the cache.
_SHORTEST = 32
# How many prompts are compared with a new one.
_RECENT = 16


class Prefixes:
    """KV caches of one row that hold beginnings of prompts.

    Args:
        size: int. How many to keep; those used last are.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.reused = 0
        self._caches: collections.OrderedDict[bytes, Cache] = collections.OrderedDict()
        self._recent: collections.deque[np.ndarray] = collections.deque(maxlen=_RECENT)

    def find(self, tokens: np.ndarray) -> tuple[int, Cache]:
        """Returns how many first tokens a cache holds, and a copy of it, or 0 and `None`.

        It never holds all tokens, as the last one's logits are needed.
        """
        found = [key for key in self._caches if tokens[:-1].tobytes().startswith(key)]
        if not found:
            return 0, None
        key = max(found, key=len)
        self._caches.move_to_end(key)
        self.reused += 1
        return len(key) // tokens.itemsize, _copy(self._caches[key])

    def shared(self, tokens: np.ndarray) -> int:
        """Returns how many first tokens a recent prompt has, too, if they are many.

        The prompt is a recent one from then on.
        """
        lengths = [common_length(tokens[:-1], other) for other in self._recent]
        self._recent.append(tokens)
        longest = max(lengths, default=0)
        return longest if self.size and longest >= _SHORTEST else 0

    def keep(self, tokens: np.ndarray, cache: Cache) -> None:
        """Keeps a copy of a cache that holds exactly these tokens."""
        self._caches[tokens.tobytes()] = _copy(cache)
        while len(self._caches) > self.size:
            self._caches.popitem(last=False)


def _copy(cache: Cache) -> Cache:
    # The memory of the other is reused.
    return tree.map_structure(ops.copy, cache)
