"""Layers in a `keras.RematScope`, which computes them again for their gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops, tree

from attention.contract.scores import scores_wanted
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


class _AsAtFirst(keras.layers.Layer):
    """Runs a function for the same `training` as at first.

    Layers take it from the layers around them, and there are none any more when
    gradients are computed.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(autocast=False, name="again")
        self._function = function
        self._at_first: tuple[bool | None, ...] = ()

    def run(self, tensors: list[Tensor]) -> Any:
        # Without the argument, Keras passes that of the layers around.
        known = {"training": self._at_first[0]} if self._at_first else {}
        return self(tensors, **known)

    def call(self, tensors: list[Tensor], training: bool | None = None) -> Any:
        self._at_first = (training,)
        return self._function(*tensors)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        return None


def rematerialize_tensors(
    layer: Any,
    rematerialized_call: Callable,
    layer_call: Callable,
    args: tuple,
    kwargs: dict,
) -> Callable:
    """Returns a layer's `call` that is computed again with all its tensors as arguments.

    Backends take all arguments of a rematerialized function for tensors, and TensorFlow
    takes none by keyword, so Keras's `rematerialized_call` gets tensors only. Variables
    are among them, and what they are changed to is returned: dropout that is computed
    again draws the same numbers, although its seed is another by then. (Keras 3.15 draws
    others or none, and so has other gradients on TensorFlow, and errors on JAX and torch.)
    """
    if scores_wanted():
        # They can't leave what is computed again.
        return layer_call
    flat = tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(flat) if is_tensor(x)]
    variables = layer.variables
    changed: list[keras.Variable] = []

    def call(*tensors: Tensor) -> Any:
        filled = list(flat)
        for place, tensor in zip(places, tensors):
            filled[place] = tensor
        args_again, kwargs_again = tree.pack_sequence_as((args, kwargs), filled)
        known = list(zip(variables, tensors[len(places) :]))
        with keras.StatelessScope(known, collect_losses=True) as scope:
            before = [scope.get_current_value(x) for x in variables]
            outputs = layer_call(*args_again, **kwargs_again)
            after = [scope.get_current_value(x) for x in variables]
        new = [(x, z) for x, y, z in zip(variables, before, after) if y is not z]
        changed[:] = [x for x, _ in new]
        return outputs, [value for _, value in new], list(scope.losses)

    run_call = _AsAtFirst(call)

    def call_again(*tensors: Tensor) -> Any:
        return run_call.run(list(tensors))

    tensors = [flat[i] for i in places]
    tensors += [ops.convert_to_tensor(x.value) for x in variables]
    again = rematerialized_call(call_again, *tensors)
    if again is call_again:
        return layer_call

    def run(*_: Any, **__: Any) -> Any:
        outputs, values, losses = again(*tensors)
        for variable, value in zip(changed, values):
            variable.assign(value)
        for loss in losses:
            layer.add_loss(loss)
        return outputs

    return run
