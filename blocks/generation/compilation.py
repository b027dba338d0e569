"""Compiling a step of generation on each backend."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree

from attention.contract import all_layers
from blocks.generation.sampler_contents import sampler_contents

# Reading a seed and moving it on are two steps: of two threads between them both
# would draw the same numbers. Models may share a sampler.
_DRAWING = threading.RLock()


def compile_function(
    function: Callable,
    task: Any,
    sampler: Any = None,
    donate: tuple[int, ...] = (),
    fixed: bool = False,
) -> Callable:
    """Compiles a function that reads a model's variables.

    Args:
        function: takes and returns pytrees of tensors. It may read the
            variables of `task`, and read and assign those of `sampler`.
        task: the model. Its `run_eagerly` and `xla_generation` are obeyed.
        sampler: a `keras_hub.samplers.Sampler`, or `None`.
        donate: the positions of arguments whose memory may be reused, as they
            are not used after the call.
        fixed: bool. Whether to compile one way, whatever the task's settings, for
            what must give the same numbers to the last bit.

    Returns:
        A function of the same signature.
    """
    backend = keras.config.backend()
    eager = task.run_eagerly and not fixed
    seeds = sampler_variables(sampler, task)
    compiled = function
    if backend == "torch":
        compiled = _without_gradients(function)
    elif backend == "tensorflow" and not eager:
        import tensorflow as tf

        xla = task.xla_generation and not fixed
        compiled = tf.function(function, jit_compile=xla, autograph=False)
    elif backend == "jax" and not eager:
        compiled = _jit(function, task, seeds, donate)

    def run(*args: Any) -> Any:
        args = tree.map_structure(ops.convert_to_tensor, args)
        with _DRAWING if seeds else contextlib.nullcontext():
            return compiled(*args)

    # For those who want to see what JAX compiles.
    run.lower = getattr(compiled, "lower", None)  # type: ignore[attr-defined]
    return run


def _without_gradients(function: Callable) -> Callable:
    import torch

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return run


def _jit(
    function: Callable,
    task: keras.Model,
    seeds: list[keras.Variable],
    donate: tuple[int, ...],
) -> Callable:
    import jax

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
        # Generation changes no variable but the sampler's.
        for seed, value in zip(seeds, updated):
            seed.assign(value)
        return outputs

    run.lower = lambda *args: jitted.lower(  # type: ignore[attr-defined]
        ([v.value for v in seeds], [v.value for v in weights]), *args
    )
    return run


def sampler_variables(sampler: Any, task: keras.Model) -> list[keras.Variable]:
    """The seeds and other variables of a sampler that are not the model's."""
    if sampler is None:
        return []
    own = {id(v) for v in task.variables}
    return [v for v in sampler_contents(sampler).variables if id(v) not in own]


class CompiledFunctions:
    """Compiled functions of a task, made anew when what they read has changed.

    A compiled function has the variables, the dtypes and some of the sampler's
    settings of its making in it. LoRA, quantization, another sampler or other
    settings of the same sampler replace them.

    Attributes:
        count: int. How many times a function was traced and compiled so far.
        layers: the task's layers, and those within them, as the functions were
            made for.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self._functions: dict[Any, Callable] = {}
        self._model_read: tuple = ()
        self._sampler_read: tuple = ()
        self.layers: list[keras.layers.Layer] = []
        self.count = 0

    def get(
        self,
        key: Any,
        make: Callable[[], Callable],
        donate: tuple[int, ...] = (),
        sampler: Any = None,
        fixed: bool = False,
    ) -> Callable:
        """Returns the function of this key, compiling what `make()` returns.

        Args:
            key: hashable. What the function was specialized for.
            make: returns the function to compile.
            donate: as for `compile_function`.
            sampler: the sampler that the function uses, or `None`.
            fixed: as for `compile_function`.
        """
        self._forget_what_is_stale(sampler)
        key = (key, sampler is not None)
        if key not in self._functions:
            self._functions[key] = compile_function(
                self._counted(make(), sampler), self._task, sampler, donate, fixed
            )
        return self._functions[key]

    def _counted(self, function: Callable, sampler: Any) -> Callable:
        compiles = keras.config.backend() != "torch" and not self._task.run_eagerly

        def counted(*args: Any) -> Any:
            # Python runs when a function is traced, once for each compilation.
            self.count += compiles
            outputs = function(*args)
            if compiles and sampler is not None:
                # What tracing changes, a counter for instance, makes nothing stale.
                self._sampler_read = _read_sampler(sampler)
            return outputs

        return counted

    def _forget_what_is_stale(self, sampler: Any) -> None:
        task = self._task
        policies = tuple(layer.dtype_policy.name for layer in self.layers)
        read: tuple = (
            list(task.variables),
            (task.run_eagerly, task.xla_generation, policies),
        )
        if not _same(read, self._model_read):
            self._functions.clear()
            self.layers = all_layers(task)
            policies = tuple(layer.dtype_policy.name for layer in self.layers)
            settings = (task.run_eagerly, task.xla_generation, policies)
            self._model_read = (read[0], settings)
        if sampler is None:
            return
        read = _read_sampler(sampler)
        if not _same(read, self._sampler_read):
            # What uses no sampler stays.
            for key in [key for key in self._functions if key[1]]:
                del self._functions[key]
            self._sampler_read = read


def _read_sampler(sampler: Any) -> tuple:
    values, objects, variables = sampler_contents(sampler)
    return [*objects, *variables], (values,)


def _same(a: tuple, b: tuple) -> bool:
    """Compares objects by identity (kept, so that they stay distinct), and values."""
    if not a or not b or a[1] != b[1] or len(a[0]) != len(b[0]):
        return False
    return all(x is y for x, y in zip(a[0], b[0]))
