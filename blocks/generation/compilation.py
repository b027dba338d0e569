"""Compiles the steps of generation: for which sizes, and why anew."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from attention.contract import all_layers, check_positive_int
from blocks.generation.sampling import Sampling

_LOGGER = logging.getLogger("blocks.generation")

# For how many samplers and kinds of options steps are kept.
_KEPT = 8

# A seed is read and then advanced: two threads between these steps would draw the same
# numbers. Models may share a sampler.
_DRAWING = threading.RLock()


@dataclasses.dataclass(frozen=True)
class GenerationSizes:
    """How much generation does at once, and which sizes it compiles for.

    Each size of a batch, a KV cache or a chunk is compiled, so there are few. They
    affect the speed of generation and the number of compilations, never the outputs.
    The figures in `benchmarks/README.md` are those of the defaults.

    Example:

    >>> from blocks import GenerationSizes
    >>> sizes = GenerationSizes()
    >>> [sizes.round_up_capacity(n) for n in (1, 129, 513, 769, 1025)]
    [144, 144, 576, 864, 1152]
    >>> sizes.chunk_length(batch_size=1, capacity=1152)
    256
    """

    block_steps: int = 32
    """The most decode steps of one compiled call. Between two calls the host sees the
    new tokens, stops if all rows are done, and grows the KV cache if it is full."""

    min_capacity: int = 144
    """The smallest KV cache, in positions. The next sizes are 2 and 4 times it, then
    there are two sizes for each doubling, so that few empty slots are attended. It is an
    eighth more than a power of two, as prompts are often cut to a power of two."""

    min_chunk: int = 32
    """The smallest number of tokens of each row that a prefill processes at once. A chunk
    is a power of two times this, about a fourth of the capacity, so that there is little
    padding."""

    max_chunk: int = 512
    """The largest number of tokens of each row that are processed at once. More make
    products no faster, but attend to more keys that the causal mask hides."""

    max_chunk_tokens: int = 1024
    """The largest number of tokens of all rows together that are processed at once."""

    few_tokens: int = 4
    """A turn of a session with at most so many tokens is not padded to a chunk; a longer
    one is padded to the smallest chunk, or to that of a prefill."""

    min_tokens_saved: int = 256
    """How many tokens of padding must be saved for rows to be prefilled in two groups,
    short and long ones: another group is another compilation."""

    few_stops: int = 8
    """The smallest number of stop tokens that is compiled for; larger ones double it."""

    progress_seconds: float = 2.0
    """After how many seconds `verbose="auto"` shows a progress bar."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int":
                check_positive_int(field.name, getattr(self, field.name))

    def round_up_capacity(self, length: int) -> int:
        """Returns the smallest size of a KV cache that holds `length` positions."""
        return _rounded_up(length, self.min_capacity, 4 * self.min_capacity)

    def chunk_length(self, batch_size: int, capacity: int) -> int:
        """Returns how many tokens of each row are processed at once."""
        chunk = self.min_chunk
        while (
            2 * chunk <= min(capacity // 4, self.max_chunk)
            and 2 * chunk * batch_size <= self.max_chunk_tokens
        ):
            chunk *= 2
        return min(chunk, capacity)

    def round_up_source(self, length: int) -> int:
        """Returns the smallest size of a source that holds `length` positions."""
        return _rounded_up(length, self.min_chunk, self.min_chunk)

    def further_chunk(self, chunk: int, length: int) -> int:
        """Returns how many of `length` further tokens are processed at once.

        It is `min_chunk` where padded to that they are half as many as padded to `chunk`.
        """
        short, long = (-(-length // x) * x for x in (self.min_chunk, chunk))
        return self.min_chunk if 2 * short <= long else chunk


def _rounded_up(length: int, size: int, halves_from: int) -> int:
    """Returns the first of some sizes that holds `length`: doubled, later by halves."""
    while size < length:
        half = size * 3 // 2
        if size >= halves_from and length <= half:
            return half
        size *= 2
    return size


class StepKey(NamedTuple):
    """The key of a compiled step; `variant` is what else is fixed in it."""

    step: str
    batch_size: int
    capacity: int | None = None
    chunk: int | None = None
    variant: Any = None


class CompiledStep(NamedTuple):
    """A compiled (traced) step of generation, one of `lm.compiled_steps`.

    Attributes:
        step: str. `"encode"` reads sources, `"prefill"` prompts, `"process"` further
            tokens, `"sample"` chooses the first new token, `"decode"` the others,
            `"verify"` checks guessed tokens, `"search"` is a sampler's own loop,
            `"decode_step"` the public method.
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
    arguments, and which logits processors there are. They are compared at each call (the
    sampler's when a generation begins), and steps of the last eight of these are kept.
    Other attributes of layers are not looked at: after changing one, make a new
    `CausalLM`. All of this goes for torch, too, where a call of the model is not compiled
    but recorded.

    Attributes:
        steps: list of `CompiledStep`: the steps compiled so far.
        layers: the task's layers, and those within them.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self._plain: dict[StepKey, Callable] = {}
        # With what steps that sample were made, the last used first.
        self._sampling: list[tuple[Sampling, dict[StepKey, Callable]]] = []
        # Why a step that was compiled before was dropped.
        self._dropped: dict[StepKey, str] = {}
        self._weights: list[keras.Variable] = []
        self._policies: list[str] = []
        self._how: tuple | None = None
        # The model's own part of a step, on torch.
        self._repeated: Callable | None = None
        self.steps: list[CompiledStep] = []
        self.layers: list[keras.layers.Layer] = []

    def run(
        self,
        key: StepKey,
        make: Callable[[Any], Callable],
        args: tuple,
        donate: tuple[int, ...] = (),
        sampling: Sampling | None = None,
    ) -> Any:
        """Returns the result of a step, which is compiled if there is none for this key.

        `make` takes an equal `sampling`, and returns the function to compile. That takes
        and returns pytrees of tensors; it may read the variables of the task, and read
        and assign those of the sampler. `donate` is the positions of arguments whose
        memory may be reused, as they are not used after the call.
        """
        step = self.get(key, make, donate, sampling)
        args = tree.map_structure(ops.convert_to_tensor, args)
        if sampling is None or not sampling.variables:
            return step(*args)
        variables = sampling.variables
        with _DRAWING:
            # The step holds an equal sampler, whose seeds may be others.
            held = self._sampling_steps(sampling)[0].variables
            _assign(held, variables)
            outputs = step(*args)
            _assign(variables, held)
        return outputs

    def get(
        self,
        key: StepKey,
        make: Callable[[Any], Callable],
        donate: tuple[int, ...] = (),
        sampling: Sampling | None = None,
    ) -> Callable:
        """Returns the compiled step of this key. The arguments are those of `run`."""
        self._drop_what_is_stale()
        steps = self._plain
        if sampling is not None:
            sampling, steps = self._sampling_steps(sampling)
        if key not in steps:
            steps[key] = self._compile(
                key, make(sampling), donate, _variables(sampling)
            )
        return steps[key]

    def call_model(self, function: Callable, *args: Any) -> Any:
        """Returns `function(*args)`, a call of the model within a step.

        On torch, where a step is not compiled, its operations are recorded. `function` is
        the same one each time.
        """
        if keras.config.backend() != "torch" or self._task.run_eagerly:
            return function(*args)
        if self._repeated is None:
            from blocks.generation.backends.torch_steps import RepeatedCalls

            task = self._task
            read = [*task.trainable_variables, *task.non_trainable_variables]
            self._repeated = RepeatedCalls(function, read)
        return self._repeated(*args)

    def _sampling_steps(
        self, sampling: Sampling
    ) -> tuple[Sampling, dict[StepKey, Callable]]:
        """Returns an equal sampling and the steps made with it, which are first then."""
        kept = self._sampling
        same = (x for x in kept if x[0].contract == sampling.contract)
        found = next(same, None)
        if found is None:
            found = (sampling, {})
            for _, steps in kept:
                self._dropped.update(dict.fromkeys(steps, "another sampler"))
        self._sampling = [found, *(x for x in kept if x is not found)][:_KEPT]
        return found

    def _compile(
        self, key: StepKey, function: Callable, donate: tuple[int, ...], variables: list
    ) -> Callable:
        if keras.config.backend() == "torch":
            import torch

            return torch.no_grad()(function)
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
        how = (task.run_eagerly, task.xla_generation)
        if not same_objects(weights, self._weights):
            reason = "weights replaced"
        elif [x.dtype_policy.name for x in self.layers] != self._policies:
            reason = "dtype policy changed"
        elif how != self._how:
            reason = "run_eagerly or jit_compile changed"
        else:
            return
        for steps in (self._plain, *(steps for _, steps in self._sampling)):
            self._dropped.update(dict.fromkeys(steps, reason))
        self._plain, self._sampling, self._repeated = {}, [], None
        self._weights, self._how, self.layers = weights, how, all_layers(task)
        self._policies = [x.dtype_policy.name for x in self.layers]


def _variables(sampling: Sampling | None) -> list[keras.Variable]:
    return [] if sampling is None else sampling.variables


def _assign(targets: list[keras.Variable], sources: list[keras.Variable]) -> None:
    for target, source in zip(targets, sources):
        if target is not source:
            target.assign(source.value)


def same_objects(a: list, b: list) -> bool:
    """Returns whether two lists hold the same objects in the same order."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))
