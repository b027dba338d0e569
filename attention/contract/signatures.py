"""What the calls of layers take: by name, by position, and from Keras by itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras

from attention.contract.context import change_context


@functools.cache
def parameters(function: Any) -> tuple[str, ...]:
    """The names of a method's parameters, without `self`."""
    return tuple(inspect.signature(function).parameters)[1:]


@functools.cache
def positional_parameters(function: Any) -> tuple[str, ...]:
    """Those of them that may be passed by position."""
    found = list(inspect.signature(function).parameters.values())[1:]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return tuple(p.name for p in found if p.kind is kind)


def with_implicit_masks(call: Callable) -> Callable:
    """A layer's `call` that takes the masks Keras attaches for its padding masks.

    `keras.layers.Embedding(mask_zero=True)`, for instance, attaches one. Keras hands
    the mask of a layer's only tensor to an argument named `mask`, and of several tensors
    those to `NAME_mask`. They count where the padding mask that belongs to the tensor is
    not given: `padding_mask` to the first, `value_padding_mask` to `value`, and so on.

    Args:
        call: a method. Without an argument `padding_mask` it is returned as it is.
    """
    signature = inspect.signature(call)
    names = list(signature.parameters)
    implicit = {name: to for name, to in _implicit(names).items() if name not in names}
    if not implicit:
        return call

    @functools.wraps(call)
    def call_with_masks(self: Any, *args: Any, **kwargs: Any) -> Any:
        if implicit.keys().isdisjoint(kwargs):
            return call(self, *args, **kwargs)
        by_position = names[1 : len(args) + 1]
        masks = {}
        for name, to in implicit.items():
            mask = kwargs.pop(name, None)
            if mask is not None and to not in by_position and kwargs.get(to) is None:
                masks[to] = kwargs[to] = mask
        mask = masks.get("padding_mask")
        if mask is None:
            return call(self, *args, **kwargs)
        # For the layers within, too, as with a mask that is given.
        mask = None if isinstance(mask, keras.KerasTensor) else mask
        with change_context(padding_mask=mask):
            return call(self, *args, **kwargs)

    kind = inspect.Parameter.KEYWORD_ONLY
    own = list(signature.parameters.values())
    # Nothing may come behind `**kwargs`.
    end = len(own) - any(p.kind is p.VAR_KEYWORD for p in own)
    added = [inspect.Parameter(name, kind, default=None) for name in implicit]
    call_with_masks.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own[:end], *added, *own[end:]]
    )
    return call_with_masks


def _implicit(names: list[str]) -> dict[str, str]:
    """The masks that Keras may hand over, and the arguments that they stand for."""
    if "padding_mask" not in names:
        return {}
    found = {"mask": "padding_mask", f"{names[1]}_mask": "padding_mask"}
    for name in names:
        owner = name.removesuffix("_padding_mask")
        for tensor in names if owner != name else ():
            if tensor == owner or tensor == f"{owner}_sequence":
                found[f"{tensor}_mask"] = name
    return found
