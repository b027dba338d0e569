"""What a sampler holds: settings that a compiled step has in it, and variables."""

from __future__ import annotations

import numbers
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np

from blocks.generation.sampler_settings import number_settings

_BACKENDS = ("tensorflow", "jax", "jaxlib", "torch")


class SamplerContents(NamedTuple):
    """What can be reached from a sampler, however it is kept.

    Attributes:
        values: settings that are compared by value.
        objects: what is compared by identity.
        variables: seeds and other variables, each once. A compiled step reads them
            anew and may assign them.
    """

    values: list[Any]
    objects: list[Any]
    variables: list[keras.Variable]


def sampler_contents(sampler: Any) -> SamplerContents:
    """Looks into a sampler, and into the objects, lists and dicts within it.

    `Sampler.variables` has only the seeds that are attributes of the sampler itself,
    and a sampler of the user's may be made of others. What `number_settings` returns is
    left out: a compiled step takes that as arguments.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.
    """
    contents = SamplerContents([], [sampler], list(sampler.variables))
    seen = {id(sampler), *map(id, contents.variables)}
    arguments = number_settings(sampler)

    def add(value: Any) -> None:
        if value is None or isinstance(value, (bool, str, bytes, numbers.Number)):
            contents.values.append((type(value).__name__, repr(value)))
        elif isinstance(value, np.ndarray):
            # The printed form of a large array leaves most of it out.
            contents.values.append((value.dtype.str, value.shape, value.tobytes()))
        elif isinstance(value, (set, frozenset)):
            contents.values.append({(type(x).__name__, x) for x in value})
        elif id(value) not in seen:
            seen.add(id(value))
            add_new(value)

    def add_new(value: Any) -> None:
        if isinstance(value, dict):
            add_attributes(value.items())
        elif isinstance(value, (list, tuple)):
            contents.values.append(len(value))
            for item in value:
                add(item)
        elif isinstance(value, keras.Variable):
            contents.variables.append(value)
        else:
            contents.objects.append(value)
            if isinstance(value, keras.layers.Layer):
                for variable in value.variables:
                    add(variable)
            elif _may_hold_settings(value):
                add_attributes(_attributes(value))

    def add_attributes(items: Iterable[tuple[Any, Any]]) -> None:
        for name, value in items:
            add(name)
            add(value)

    add_attributes(x for x in _attributes(sampler) if x[0] not in arguments)
    return contents


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from sorted(getattr(value, "__dict__", {}).items())
    for owner in type(value).__mro__:
        slots = vars(owner).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                yield name, getattr(value, name)


def _may_hold_settings(value: Any) -> bool:
    """Whether an object is one of those that samplers are made of.

    Python's own are not, such as modules, functions, locks and loggers, and neither
    are tensors and what else belongs to a backend.
    """
    package = type(value).__module__.partition(".")[0]
    own = package in sys.stdlib_module_names or package in _BACKENDS
    return isinstance(value, types.SimpleNamespace) or not own


class LoopSampler(keras_hub.samplers.Sampler):
    """KerasHub's loop of steps, for a sampler with variables at any depth.

    Args:
        variables: what the steps of the loop may assign.
    """

    def __init__(self, variables: list[keras.Variable]) -> None:
        super().__init__()
        self._in_loop = variables

    @property
    def variables(self) -> list[keras.Variable]:
        return self._in_loop
