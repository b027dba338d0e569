"""Layers within `keras.RematScope`, which are computed again for their gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras


@contextlib.contextmanager
def hide_full_remat() -> Iterator[None]:
    """Hides a `keras.RematScope(mode="full")` from the layers made inside.

    A cached layer is computed again as a whole, so what it is made of need not be,
    once more, within that. Some of Keras's layers can't be: `Dropout` gets `training`,
    and `ReversibleEmbedding` gets `reverse`, which backends then take for tensors.
    """
    # In no other mode would Keras wrap the `call` of something unnamed.
    full = keras.Operation().rematerialized_call(print) is not print
    with keras.RematScope(mode=None) if full else contextlib.nullcontext():
        yield


def build_as_one(build: Callable) -> Callable:
    """Wraps a layer's `build`, so that what it makes is not computed again twice."""

    @functools.wraps(build)
    def build_within(self: Any, *args: Any, **kwargs: Any) -> Any:
        with hide_full_remat():
            return build(self, *args, **kwargs)

    return build_within


def rematerialize_inner_layers(
    self: Any, layer_call: Callable, *args: Any, **kwargs: Any
) -> Callable:
    """Returns a model's `call` as it is: its layers are computed again, each by itself.

    It stands in for a model's `rematerialized_call`.
    """
    return layer_call
