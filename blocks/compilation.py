"""Compiling a step of generation on each backend."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree


def compile_function(
    function: Callable, task: keras.Model, sampler: Any, donate: tuple[int, ...] = ()
) -> Callable:
    """Compiles a function that reads a model's variables.

    Args:
        function: takes and returns pytrees of tensors. It may read the
            variables of `task`, and read and assign those of `sampler`.
        task: the model. Its `run_eagerly` and `jit_compile` are obeyed.
        sampler: a `keras_hub.samplers.Sampler`: its variables are seeds.
        donate: the positions of arguments whose memory may be reused, as they
            are not used after the call.

    Returns:
        A function of the same signature.
    """
    backend = keras.config.backend()
    compiled = function
    if backend == "torch":
        compiled = _without_gradients(function)
    elif backend == "tensorflow" and not task.run_eagerly:
        import tensorflow as tf

        jit_compile = bool(getattr(task, "jit_compile", True))
        compiled = tf.function(function, jit_compile=jit_compile, autograph=False)
    elif backend == "jax" and not task.run_eagerly:
        compiled = _jit(function, task, sampler, donate)

    def run(*args: Any) -> Any:
        return compiled(*tree.map_structure(ops.convert_to_tensor, args))

    return run


def _without_gradients(function: Callable) -> Callable:
    import torch

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return run


def _jit(
    function: Callable, task: keras.Model, sampler: Any, donate: tuple[int, ...]
) -> Callable:
    import jax

    seeds = list(sampler.variables)
    weights = [*task.trainable_variables, *task.non_trainable_variables]

    def stateless(values: Any, *args: Any) -> Any:
        mapping = zip(itertools.chain(seeds, weights), itertools.chain(*values))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            outputs = function(*args)
        current = [scope.get_current_value(seed) for seed in seeds]
        return outputs, [
            old if new is None else new for new, old in zip(current, values[0])
        ]

    jitted = jax.jit(stateless, donate_argnums=tuple(i + 1 for i in donate))

    def run(*args: Any) -> Any:
        values = ([v.value for v in seeds], [v.value for v in weights])
        outputs, updated = jitted(values, *args)
        # Generation changes no variable but the sampler's seeds.
        for seed, value in zip(seeds, updated):
            seed.assign(value)
        return outputs

    return run


class CompiledFunctions:
    """Compiled functions of a task, made anew when what they read has changed.

    A compiled function has the variables, the dtypes and the sampler's settings
    of its making in it. LoRA, quantization, another sampler or other settings
    of the same sampler replace them.
    """

    def __init__(self, task: keras.Model) -> None:
        self._task = task
        self._functions: dict[Any, Callable] = {}
        self._read: tuple = ()

    def get(
        self, key: Any, make: Callable[[], Callable], donate: tuple[int, ...] = ()
    ) -> Callable:
        """Returns the function of this key, compiling what `make()` returns.

        Args:
            key: hashable. What the function was specialized for.
            make: returns the function to compile.
            donate: as for `compile_function`.
        """
        read = self._what_is_read()
        if not _same(read, self._read):
            self._functions.clear()
            self._read = read
        if key not in self._functions:
            self._functions[key] = compile_function(
                make(), self._task, self._task.sampler, donate
            )
        return self._functions[key]

    def _what_is_read(self) -> tuple:
        task = self._task
        settings = (task.run_eagerly, getattr(task, "jit_compile", None))
        layers = task.backbone.layers
        policies = tuple(layer.dtype_policy.name for layer in layers)
        # Objects are compared by identity, and kept so that they stay distinct.
        sampler_settings, sampler_objects = _settings(task.sampler)
        objects = [task.sampler, *sampler_objects, *task.variables]
        return objects, (settings, policies, sampler_settings)


def _same(a: tuple, b: tuple) -> bool:
    if not a or not b or a[1] != b[1] or len(a[0]) != len(b[0]):
        return False
    return all(x is y for x, y in zip(a[0], b[0]))


def _settings(sampler: Any) -> tuple[list[Any], list[Any]]:
    """The attributes of a sampler that its user may have set.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.

    Returns:
        What is compared by value, and what is compared by identity.
    """
    values: list[Any] = []
    objects: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, (list, tuple)):
            values.append(len(value))
            for item in value:
                add(item)
        elif isinstance(value, np.ndarray):
            # The printed form of a large array leaves most of it out.
            values.append((value.dtype.str, value.shape, value.tobytes()))
        elif value is None or isinstance(value, (bool, str, bytes, numbers.Number)):
            values.append((type(value).__name__, repr(value)))
        else:
            objects.append(value)

    add({k: v for k, v in sorted(vars(sampler).items()) if not k.startswith("_")})
    return values, objects
