"""Layers in a `keras.RematScope`, which computes them again for their gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras


@contextlib.contextmanager
def hide_full_remat() -> Iterator[None]:
    """Hides a `keras.RematScope(mode="full")` from the layers made inside.

    A cached layer is computed again as a whole, so its inner layers need not be. Some
    of Keras's layers can't be: the arguments `training` of `Dropout` and `reverse` of
    `ReversibleEmbedding` are then taken for tensors.
    """
    # In other modes Keras does not wrap the `call` of an operation without a name.
    full = keras.Operation().rematerialized_call(print) is not print
    with keras.RematScope(mode=None) if full else contextlib.nullcontext():
        yield


def build_as_one(build: Callable) -> Callable:
    """Wraps a layer's `build`, so that its inner layers are not computed again twice."""

    @functools.wraps(build)
    def build_within(self: Any, *args: Any, **kwargs: Any) -> Any:
        with hide_full_remat():
            return build(self, *args, **kwargs)

    return build_within
