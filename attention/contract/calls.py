"""Wraps the `call` of cached layers, and inspects the arguments of calls."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from attention.contract.context import change_context, context
from attention.contract.scopes import OR_NO_CACHE
from attention.contract.types import Cache

_BY_PLACE_OR_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD


@functools.cache
def parameters(function: Callable) -> tuple[str, ...]:
    """Returns the names of a method's parameters, without `self`."""
    return tuple(inspect.signature(function).parameters)[1:]


@functools.cache
def positional_parameters(function: Callable) -> tuple[str, ...]:
    """Returns the names of parameters that may be passed by position."""
    found = list(inspect.signature(function).parameters.values())[1:]
    return tuple(p.name for p in found if p.kind is _BY_PLACE_OR_NAME)


def in_context(call: Callable) -> Callable:
    """Wraps the method `call` of a layer, so that it runs in a context of its own.

    In a scope it can't be run past the layer's `__call__`. The layers that it calls
    without a padding mask get its own. Without a mask of its own or around it, it gets
    the mask that Keras attached to its inputs (`attention.contract.context` has the
    order). Keras passes the mask of a layer's only tensor to an argument named `mask`,
    and those of several tensors to `NAME_mask`; these arguments are added here, and
    their masks become `padding_mask` (of the first tensor), `value_padding_mask` (of
    `value`) and so on.
    """
    signature = inspect.signature(call)
    names = list(signature.parameters)
    attached = {x: to for x, to in _attached_masks(names).items() if x not in names}
    of_tokens = ("padding_mask", "segment_ids")
    places = {name: names.index(name) - 1 for name in of_tokens if name in names}

    @functools.wraps(call)
    def call_in_context(self: Any, *args: Any, **kwargs: Any) -> Any:
        if context().running is self:
            # `super().call(...)`, with the arguments that a subclass chose.
            return call(self, *args, **kwargs)
        scope = context().scope
        if scope is not None:
            scope.refuse(
                f"`call` of layer '{self.name}' ({type(self).__name__}) is run past "
                "its `__call__`, as `keras.layers.TimeDistributed` does. It would get "
                "no cache, and forget what it saw. Call the layer itself, "
                "`layer(x)`, on the whole sequence" + OR_NO_CACHE
            )
        for name, to in attached.items():
            mask = kwargs.pop(name, None)
            if kwargs.get(to) is None and names.index(to) > len(args):
                kwargs[to] = mask
        changes = {"running": self}
        for name, place in places.items():
            changes[name] = args[place] if place < len(args) else kwargs.get(name)
        with change_context(**changes):
            return call(self, *args, **kwargs)

    own = list(signature.parameters.values())
    # Nothing may come after `**kwargs`.
    end = len(own) - any(p.kind is p.VAR_KEYWORD for p in own)
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, kind, default=None) for name in attached]
    call_in_context.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own[:end], *added, *own[end:]]
    )
    return call_in_context


def _attached_masks(names: list[str]) -> dict[str, str]:
    """Returns the masks that Keras may pass, and the arguments that they become."""
    if "padding_mask" not in names:
        return {}
    found = {"mask": "padding_mask", f"{names[1]}_mask": "padding_mask"}
    for name in names:
        owner = name.removesuffix("_padding_mask")
        for tensor in names if owner != name else ():
            if tensor == owner or tensor == f"{owner}_sequence":
                found[f"{tensor}_mask"] = name
    return found


def keeping_sequence(get_config: Callable) -> Callable:
    """Returns a `get_config` that also says to which sequence a layer belongs.

    (Where a class has none, Keras saves all arguments by itself.)
    """

    @functools.wraps(get_config)
    def method(self: Any) -> dict[str, Any]:
        config = get_config(self)
        return config if self.sequence == "target" else {**config, "sequence": "source"}

    return method


def taking_source_length(create_cache: Callable) -> Callable:
    """Returns a `create_cache` that may be given a `source_length` it has no use for."""
    if "source_length" in parameters(create_cache):
        return create_cache

    @functools.wraps(create_cache)
    def method(
        self: Any,
        batch_size: int,
        max_length: int,
        source_length: int | None = None,
    ) -> Cache:
        return create_cache(self, batch_size, max_length)

    return method


@dataclasses.dataclass
class Untracked:
    """Holds a value on a layer, hidden from Keras's tracking of sublayers."""

    key: Any
    value: Any
