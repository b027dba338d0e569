"""Layers in a `keras.RematScope`, which computes them again for their gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree

from attention.contract.sizes import is_tensor
from attention.contract.types import Tensor


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


def rematerialize_tensors(
    rematerialized_call: Callable, layer_call: Callable, args: tuple, kwargs: dict
) -> Callable:
    """Returns a layer's `call` that is computed again with its tensors as arguments.

    Backends take all arguments of a rematerialized function for tensors, and TensorFlow
    takes none by keyword, so Keras's `rematerialized_call` gets the tensors only.
    """
    flat = tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(flat) if is_tensor(x)]

    def call(*tensors: Tensor) -> Any:
        filled = list(flat)
        for place, tensor in zip(places, tensors):
            filled[place] = tensor
        args_again, kwargs_again = tree.pack_sequence_as((args, kwargs), filled)
        return layer_call(*args_again, **kwargs_again)

    tensors = [flat[i] for i in places]
    again = rematerialized_call(call, *tensors)
    return lambda *_, **__: again(*tensors)
