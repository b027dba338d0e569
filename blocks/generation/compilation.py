"""Compiles the steps of generation, and records what was compiled and why."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from attention.contract import all_layers
from blocks.generation.samplers import sampler_contract

_LOGGER = logging.getLogger("blocks.generation")

# A seed is read and then advanced: two threads between these steps would draw the same
# numbers. Models may share a sampler.
_DRAWING = threading.RLock()


class StepKey(NamedTuple):
    """The key of a compiled step.

    Attributes:
        step: str. See `CompiledStep`.
        batch_size: int.
        capacity: int or `None`.
        chunk: int or `None`.
        variant: hashable. Anything else that is fixed in the compiled step.
    """

    step: str
    batch_size: int
    capacity: int | None = None
    chunk: int | None = None
    variant: Any = None


class CompiledStep(NamedTuple):
    """A compiled (traced) step of generation, one of `lm.compiled_steps`.

    Attributes:
        step: str. `"prefill"` reads prompts, `"process"` further tokens, `"sample"`
            chooses the first new token, `"decode"` the others, `"verify"` checks guessed
            tokens, `"search"` is a sampler's own loop, `"decode_step"` the public method.
        batch_size: int. The number of rows.
        capacity: int or `None`. The size of the KV cache, in positions; `None` where there
            is none, or its size was not known.
        chunk: int or `None`. How many tokens of each row are processed at once.
        reason: str. Why it was compiled: `"first time"`, `"new shape"`, or for a
            recompile (retrace) of a step that was there before: `"weights replaced"`,
            `"dtype policy changed"`, `"run_eagerly or jit_compile changed"`, `"another
            sampler"`.
    """

    step: str
    batch_size: int
    capacity: int | None
    chunk: int | None
    reason: str


class CompiledFunctions:
    """The compiled steps of a task, compiled again when a constant of theirs changes.

    Fixed in a compiled step are the variables that it reads (not their values), the
    layers' dtype policies, `run_eagerly` and `jit_compile`; for a step that samples, also
    the sampler's `get_config()`, but for numbers such as `temperature`, which are
    arguments. They are compared at each call. Other attributes of layers are not looked
    at: after changing one, make a new `CausalLM`.

    Attributes:
        steps: list of `CompiledStep`: the steps compiled so far.
        layers: the task's layers, and those within them.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self._plain: dict[StepKey, Callable] = {}
        self._sampling: dict[StepKey, Callable] = {}
        # Why a step that was compiled before was dropped.
        self._dropped: dict[StepKey, str] = {}
        self._weights: list[keras.Variable] = []
        self._policies: list[str] = []
        self._how: tuple | None = None
        self._contract: Any = None
        # The sampler that `_sampling` was made with.
        self._sampler: Any = None
        self.steps: list[CompiledStep] = []
        self.layers: list[keras.layers.Layer] = []

    def run(
        self,
        key: StepKey,
        make: Callable[[Any], Callable],
        args: tuple,
        donate: tuple[int, ...] = (),
        sampler: Any = None,
    ) -> Any:
        """Runs a step, which is compiled if there is none for this key.

        Args:
            key: the sizes and options that the step is compiled for.
            make: takes a sampler, or `None`, and returns the function to compile. That
                takes and returns pytrees of tensors; it may read the variables of the
                task, and read and assign those of the sampler.
            args: its arguments.
            donate: the positions of arguments whose memory may be reused, as they are
                not used after the call.
            sampler: the sampler that the step uses, or `None`.

        Returns:
            The result of the function.
        """
        step = self.get(key, make, donate, sampler)
        args = tree.map_structure(ops.convert_to_tensor, args)
        variables = [] if sampler is None else sampler.variables
        if not variables:
            return step(*args)
        with _DRAWING:
            # The step holds an equal sampler, whose seeds may be others.
            _assign(self._sampler.variables, variables)
            outputs = step(*args)
            _assign(variables, self._sampler.variables)
        return outputs

    def get(
        self,
        key: StepKey,
        make: Callable[[Any], Callable],
        donate: tuple[int, ...] = (),
        sampler: Any = None,
    ) -> Callable:
        """Returns the compiled step of this key. The arguments are those of `run`."""
        self._drop_what_is_stale()
        if sampler is not None:
            self._drop_another_sampler(sampler)
        steps = self._plain if sampler is None else self._sampling
        if key not in steps:
            sampler = sampler and self._sampler
            steps[key] = self._compile(key, make(sampler), donate, sampler)
        return steps[key]

    def _compile(
        self, key: StepKey, function: Callable, donate: tuple[int, ...], sampler: Any
    ) -> Callable:
        if keras.config.backend() == "torch":
            from blocks.generation.backends.torch_steps import without_gradients

            return without_gradients(function)
        if self._task.run_eagerly:
            return function

        def traced(*args: Any) -> Any:
            # Python runs when a function is traced, once for each compilation.
            self._note(key)
            return function(*args)

        if keras.config.backend() == "tensorflow":
            from blocks.generation.backends.tensorflow_steps import compile_step

            return compile_step(traced, self._task.xla_generation)
        from blocks.generation.backends.jax_steps import JaxStep

        variables = [] if sampler is None else sampler.variables
        return JaxStep(traced, self._task, variables, donate)

    def _note(self, key: StepKey) -> None:
        seen = any(step.step == key.step for step in self.steps)
        reason = self._dropped.pop(key, "new shape" if seen else "first time")
        self.steps.append(CompiledStep(*key[:4], reason))
        _LOGGER.info("Compiling %s", self.steps[-1])

    def _drop_what_is_stale(self) -> None:
        task = self._task
        # Not all variables: a model gets others, of its metrics, when it is trained.
        weights = task.weights
        policies = [layer.dtype_policy.name for layer in self.layers]
        how = (task.run_eagerly, task.xla_generation)
        if not same_objects(weights, self._weights):
            reason = "weights replaced"
        elif policies != self._policies:
            reason = "dtype policy changed"
        elif how != self._how:
            reason = "run_eagerly or jit_compile changed"
        else:
            return
        self._drop(self._plain, reason)
        self._drop(self._sampling, reason)
        self._weights, self._how = weights, how
        self.layers = all_layers(task)
        self._policies = [layer.dtype_policy.name for layer in self.layers]

    def _drop_another_sampler(self, sampler: Any) -> None:
        eager = keras.config.backend() == "torch" or self._task.run_eagerly
        # A step that is not compiled reads the sampler itself.
        contract = sampler if eager else sampler_contract(sampler, self._task)
        if contract is not self._contract and contract != self._contract:
            self._drop(self._sampling, "another sampler")
            self._contract = contract
            self._sampler = sampler

    def _drop(self, steps: dict[StepKey, Callable], reason: str) -> None:
        self._dropped.update(dict.fromkeys(steps, reason))
        steps.clear()


def _assign(targets: list[keras.Variable], sources: list[keras.Variable]) -> None:
    for target, source in zip(targets, sources):
        if target is not source:
            target.assign(source.value)


def same_objects(a: list, b: list) -> bool:
    """Returns whether two lists hold the same objects in the same order."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))
