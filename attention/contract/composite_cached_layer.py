"""A cached layer made of other layers, whose caches it creates and passes on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from keras import ops

from attention.contract.arguments import describe
from attention.contract.cached_layer import CachedLayer
from attention.contract.cached_model import (
    CallSites,
    can_rewind,
    find_call_sites,
    grow_cache,
    max_positions,
)
from attention.contract.calls import Untracked, parameters, positional_parameters
from attention.contract.context import change_context, context
from attention.contract.scopes import CacheScope, RecordingScope
from attention.contract.types import Cache, Index, Mask, Tensor

# Arguments of `call` that are not passed on to `transform`, or only if it names them.
_CACHE_ARGUMENTS = ("cache", "cache_update_index", "training", "segment_ids")


@functools.cache
def _further_arguments(transform: Callable) -> dict[str, inspect.Parameter]:
    """Returns the parameters of `transform` that not every composite layer has."""
    known = ("padding_mask", *_CACHE_ARGUMENTS)
    after_x = list(inspect.signature(transform).parameters.values())[2:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p for p in after_x if p.kind in kinds and p.name not in known}


def _needed(parameters: dict[str, inspect.Parameter]) -> list[str]:
    """Returns the names of those parameters that have no default."""
    return [name for name, p in parameters.items() if p.default is p.empty]


def _call_with_arguments_of(transform: Callable) -> Callable:
    """Returns a layer's `call` with the arguments that `transform` names."""
    further = _further_arguments(transform)
    # Positional ones in the order in which `transform` has them.
    order = [*list(inspect.signature(transform).parameters)[2:], "padding_mask"]
    names = [x for x in dict.fromkeys(order) if x in further or x == "padding_mask"]
    names = ["x", *names, *_CACHE_ARGUMENTS]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args))
        return self._call(**kwargs)

    # The layer has checked that all needed ones are there.
    optional = further.keys() - set(_needed(further))
    defaults = {name: further[name].default for name in optional}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind) for name in ("self", "x")]
        + [inspect.Parameter(x, kind, default=defaults.get(x)) for x in names[1:]]
    )
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.transform = transform  # type: ignore[attr-defined]
    return call


class CompositeCachedLayer(CachedLayer):
    """A cached layer made of other layers, cached or not.

    A subclass writes `transform(x, padding_mask=None, training=None)` in plain
    Keras. The caches of the cached layers it calls are created and passed
    along by this class: `create_cache` runs `transform` on a few zeros to
    find the call sites, and `call` runs it in a `CacheScope`. A layer that
    is called twice has two caches.

    `transform` may name further arguments, tensors or nested tensors that come
    from other layers: `transform(x, key_value, padding_mask=None)`. The layer
    then takes them, too, as `layer(x, key_value)` or by keyword, with a cache
    and without. It may return any structure of tensors, such as `(x,
    key_value)`. As such arguments can't be made up, the call sites are recorded
    when the layer is first called without a cache, in the symbolic call that
    makes a functional model or in any other.

    Inner cached layers that are called without a padding mask use that of this layer,
    and so with `segment_ids`.

    Args:
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Raises:
        TypeError: if called with other arguments than those that `transform` names.
        ValueError: if a cache is asked for before the call sites can be known.

    Example:

    >>> import keras, numpy as np
    >>> from keras import ops
    >>> from attention import CompositeCachedLayer, MultiHeadAttention
    >>> class TwoAttentions(CompositeCachedLayer):
    ...     def build(self, inputs_shape):
    ...         self.first = MultiHeadAttention(num_heads=2)
    ...         self.first.build(inputs_shape)
    ...         self.second = MultiHeadAttention(num_heads=4)
    ...         self.second.build(inputs_shape)
    ...     def transform(self, x, padding_mask=None, training=None):
    ...         return x + self.second(self.first(x))
    >>> layer = TwoAttentions()
    >>> x = np.random.normal(size=(1, 3, 8)).astype("float32")
    >>> full = layer(x)
    >>> cache = layer.create_cache(batch_size=1, max_length=3)
    >>> head, cache = layer(x[:, :2], cache=cache, cache_update_index=0)
    >>> tail, cache = layer(x[:, 2:], cache=cache, cache_update_index=2)
    >>> bool(ops.all(ops.isclose(tail, full[:, 2:], atol=1e-5)))
    True
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        found = inspect.signature(cls.call).parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in found.values())
        if not anything and not {"cache", "cache_update_index"} <= found.keys():
            raise TypeError(
                f"`{cls.__name__}.call` takes no `cache` and no `cache_update_index`. "
                "Override `transform` instead, which needs neither: `call` runs it, "
                "without a cache and with one."
            )
        if getattr(cls.call, "transform", cls.transform) is not cls.transform:
            cls.call = _call_with_arguments_of(cls.transform)  # type: ignore
        super().__init_subclass__(**kwargs)

    def transform(
        self, x: Tensor, padding_mask: Mask | None = None, training: bool | None = None
    ) -> Tensor:
        """Computes the outputs, a tensor or any structure of tensors.

        It is written once, and knows nothing of caches. `x` is of shape `(batch,
        length, width)`, and `padding_mask` `None` or boolean, `(batch, length)`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `transform(x, "
            "padding_mask=None, training=None)`."
        )

    # Keras takes the arguments of a layer from the signature of its `call`.
    call = _call_with_arguments_of(transform)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check_arguments(args, kwargs)
        return super().__call__(*args, **kwargs)

    def _call(
        self, cache: Cache = None, cache_update_index: Index = None, **inputs: Any
    ) -> Any:
        if cache is None:
            return self._transform_noting_sites(inputs)
        with CacheScope(cache, cache_update_index, donate=context().donated) as scope:
            outputs = self._transform(inputs)
        return outputs, scope.cache

    def create_cache(
        self, batch_size: int, max_length: int, source_length: int | None = None
    ) -> tuple:
        """Creates a tuple with a cache for each call of a cached layer.

        `source_length` is how many positions another sequence may have, for layers
        that attend to one (`CrossAttention`).
        """
        return tuple(
            layer.create_cache(batch_size, max_length, source_length)
            for layer in self.inner_layers()
        )

    def grow_cache(self, cache: Cache, max_length: int) -> tuple:
        return grow_cache(self.inner_layers(), cache, max_length)

    def can_rewind(self, cache: Cache, from_index: int, to_index: int) -> bool:
        return can_rewind(self.inner_layers(), cache, from_index, to_index)

    @property
    def max_sequence_length(self) -> int | None:  # type: ignore[override]
        return max_positions(self.inner_layers())

    def inner_layers(self) -> tuple[CachedLayer, ...]:
        """Returns the cached layers that `transform` calls, in call order."""
        if "_call_site_memo" not in self.__dict__:
            # With further arguments, only a call with all of them is certain.
            certain = not _further_arguments(type(self).transform)
            sites = self._record_call_sites()
            self._call_site_memo = Untracked(certain, (sites, None))
        layers, problem = self._call_site_memo.value
        if problem:
            raise ValueError(problem)
        return layers

    def _transform(self, inputs: dict[str, Any]) -> Any:
        inputs = {"padding_mask": None, "training": None, **inputs}
        # Its first argument may have any name.
        takes = parameters(type(self).transform)[1:]
        further = {name: value for name, value in inputs.items() if name in takes}
        around = {name: inputs.get(name) for name in ("padding_mask", "segment_ids")}
        with change_context(**around):
            return self.transform(inputs["x"], **further)

    def _check_arguments(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises an error if these are not the arguments that `transform` names."""
        if not hasattr(type(self).call, "transform"):
            # A subclass with a `call` of its own checks its own arguments.
            return
        names = parameters(type(self).call)
        further = _further_arguments(type(self).transform)
        given = {*names[: len(args)], *kwargs}
        unknown = sorted(given.difference(names))
        missing = sorted({"x", *_needed(further)} - given)
        positional = positional_parameters(type(self).call)
        if len(args) <= len(positional) and not unknown and not missing:
            return
        what = f"with the arguments {unknown}" if unknown else "with too many arguments"
        what = f"without {missing}" if missing else what
        raise TypeError(
            f"Layer '{self.name}' was called {what}. Its arguments are those of "
            f"`{type(self).__name__}.transform`: {['x', *further, 'padding_mask']}; and, "
            f"by keyword, {list(_CACHE_ARGUMENTS)}. Received: {describe(args)}, "
            f"{describe(kwargs)}"
        )

    def _check_length(self, *args: Any) -> None:
        # Inner layers check their own limits, unless a subclass sets one for all.
        own = type(self).max_sequence_length
        if own is not CompositeCachedLayer.max_sequence_length:
            super()._check_length(*args)

    def _transform_noting_sites(self, inputs: dict[str, Any]) -> Any:
        """Runs `transform` without a cache, and records the call sites if needed."""
        memo = self.__dict__.get("_call_site_memo")
        needless = not _further_arguments(type(self).transform)
        if needless or (memo is not None and memo.key):
            return self._transform(inputs)
        weights = len(self.weights)
        # Not strict, as these calls need no cache so far.
        with RecordingScope(strict=False) as scope:
            outputs = self._transform(inputs)
        # Building inner layers may call others, and training may leave some out or
        # add some: then a later call decides.
        settled = self.built and len(self.weights) == weights
        certain = settled and not inputs.get("training")
        sites = tuple(scope.layers)
        self._call_site_memo = Untracked(certain, (sites, scope.problem))
        return outputs

    def _record_call_sites(self) -> CallSites:
        """Returns the call sites that a dry run of `transform` on zeros finds."""
        if not self.built:
            raise ValueError(
                f"Layer '{self.name}' has no weights yet, so its caches can't "
                "be sized. Call it once, or call its `build` with the shape of "
                "its inputs, before `create_cache`."
            )
        needed = _needed(_further_arguments(type(self).transform))
        if needed:
            raise ValueError(
                f"`{type(self).__name__}.transform` needs {needed}, so layer "
                f"'{self.name}' can't find out by itself which cached layers it "
                "calls. Call it once without a cache, with all its arguments, "
                "before `create_cache`; making a functional model is such a call."
            )
        config = self.get_build_config() or {}
        shapes = config.get("shapes_dict") or {"input": config.get("input_shape")}
        shape = tuple(next(iter(shapes.values())))

        def run(rows: int, length: int) -> Any:
            zeros = ops.zeros((rows, length, *shape[2:]), dtype=self.compute_dtype)
            return self._transform({"x": zeros, "training": False})

        return find_call_sites(run, self.name)
