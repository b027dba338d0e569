"""One object under test, and all ways of calling it."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from attention.testing.backends import compile_call, to_numpy, without_gradients
from attention.testing.comparing import Difference, difference
from attention.testing.failure import ConformanceError
from attention.testing.subjects import Subject, positional

# The largest difference between two ways to compute the same, for values of
# size 1, by the dtype that is computed in.
_TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "float16": 0.015, "bfloat16": 0.08}

INT, SCALAR, ROWS = "an int", "a scalar tensor", "one entry per row"


class Probe:
    """Calls an object on parts of a sequence and keeps track of what it does.

    Args:
        subject: what made the object.
        made: the object.
        compiled: bool or `None`. Whether calls are compiled: by XLA, or jit on
            JAX. `None` means on JAX only, where compiling a call takes a
            fraction of the time that compiling its operations takes.
    """

    def __init__(
        self, subject: Subject, made: Any, compiled: bool | None = None
    ) -> None:
        self.subject = subject
        self.made = made
        if compiled is None:
            compiled = keras.config.backend() == "jax"
        self.compiled = compiled
        self._functions: dict[Any, Any] = {}
        self._under: dict[str, Probe] = {}
        dtype = getattr(made, "compute_dtype", "float32")
        self.tolerance = _TOLERANCES.get(dtype, _TOLERANCES["float32"])
        if dtype == "float64" and keras.config.floatx() != "float64":
            self.tolerance = _TOLERANCES["float32"]
        self.tolerance = max(self.tolerance, subject.tolerance)

    @property
    def doing(self) -> str:
        """What is being done to the object, for the message of an error."""
        return self.subject.doing

    @doing.setter
    def doing(self, what: str) -> None:
        # Several objects of one subject are called in turns.
        self.subject.doing = what

    def __str__(self) -> str:
        kind = "model" if isinstance(self.made, keras.Model) else "layer"
        return f"{kind} '{self.made.name}' ({type(self.made).__name__})"

    # === Calls ===

    def create_cache(self, length: int | None = None, rows: int | None = None) -> Any:
        rows = rows or self.subject.batch_size
        length = length or self.subject.length
        self.doing = f"asked for `create_cache({rows}, {length})`"
        return self.subject.create_cache(self.made, rows, length)

    def full(
        self, inputs: Any, mask: Any = None, **masks: np.ndarray
    ) -> list[np.ndarray]:
        """The outputs of one call without a cache."""
        length = _length(inputs)
        given = [] if mask is None else ["padding_mask"]
        named = "".join(f" and `{name}`" for name in [*given, *masks])
        self.doing = f"called on {length} tokens{named} without a cache"
        call = self._function("call", None)
        outputs = call(_tensors(inputs), None, _tensors(mask), None, _tensors(masks))
        return _outputs(outputs, length)

    def step(
        self, inputs: Any, cache: Any, index: Any, mask: Any = None
    ) -> tuple[list[np.ndarray], Any]:
        """The outputs of a call with a cache, and the updated cache."""
        length = _length(inputs)
        masked = "" if mask is None else " and `padding_mask`"
        kind = INT if isinstance(index, int) else ROWS if np.ndim(index) else SCALAR
        self.doing = (
            f"called on {length} tokens{masked} with a cache and {kind} as "
            "`cache_update_index`"
        )
        static = index if isinstance(index, int) else None
        if static is None:
            index = ops.convert_to_tensor(np.asarray(index, "int32"))
        call = self._function("call_with_cache", static)
        dynamic = index if static is None else None
        outputs, cache = call(_tensors(inputs), cache, _tensors(mask), dynamic, {})
        return _outputs(outputs, length), cache

    def _function(self, name: str, static: int | None) -> Any:
        key = (name, static)
        if key not in self._functions:
            subject, made = self.subject, self.made

            def function(
                inputs: Any, cache: Any, mask: Any, index: Any, masks: Any
            ) -> Any:
                if name == "call":
                    return subject.call(made, inputs, mask, **masks)
                index = static if index is None else index
                return subject.call_with_cache(made, inputs, cache, index, mask)

            function = without_gradients(function)
            if self.compiled:
                function = self._compile(function)
            self._functions[key] = function
        return self._functions[key]

    def _compile(self, function: Any) -> Any:
        compiled = compile_call(function)

        def run(*arguments: Any) -> Any:
            try:
                return compiled(*arguments)
            except Exception as error:
                # Whose mistake is it, the layer's or that of its being compiled?
                function(*arguments)
                raise ConformanceError(
                    "compiled",
                    f"{self} runs eagerly, but raised {type(error).__name__} when it "
                    f"was compiled, {self.doing}.\n  {error}",
                ) from error

        return run

    def run(
        self, inputs: Any, sizes: list[int], kinds: tuple[str, ...]
    ) -> tuple[list[np.ndarray], Any, list[Any]]:
        """Runs a sequence in chunks from its start.

        Returns:
            The joined outputs, the last cache, and the caches after each chunk.
        """
        cache = self.create_cache()
        start, chunks, caches = 0, [], []
        for number, size in enumerate(sizes):
            kind = kinds[min(number, len(kinds) - 1)]
            index = as_index(kind, start, self.subject.batch_size)
            outputs, cache = self.step(part(inputs, start, size), cache, index)
            chunks.append(outputs)
            caches.append(cache)
            start += size
        joined = [np.concatenate(parts, axis=1) for parts in zip(*chunks)]
        return joined, cache, caches

    # === What is known of it ===

    @functools.cached_property
    def inputs(self) -> Any:
        return self.subject.sample(seed=1)

    @functools.cached_property
    def other_inputs(self) -> Any:
        """Inputs that differ in every token."""
        return self.subject.sample(seed=2)

    @functools.cached_property
    def expected(self) -> list[np.ndarray]:
        """The outputs of the whole sequence without a cache."""
        return self.full(self.inputs)

    @functools.cached_property
    def token_by_token(self) -> tuple[list[np.ndarray], Any, list[Any]]:
        """Outputs and caches of single tokens, from an empty cache."""
        return self.run(self.inputs, [1] * self.subject.length, (SCALAR,))

    def under(self, policy: str) -> Probe:
        """The same object with the same weights under another dtype policy."""
        if policy not in self._under:
            self.doing = f"made under the dtype policy {policy}"
            made = self.subject.new(policy, like=self.made)
            self._under[policy] = Probe(self.subject, made)
        return self._under[policy]

    # === Comparisons ===

    def compare(
        self,
        actual: list[np.ndarray],
        expected: list[np.ndarray],
        where: Any = None,
        positions: Any = 0,
        slack: float = 1.0,
    ) -> Difference:
        relative = self.tolerance * slack
        return difference(actual, expected, relative, where, positions)

    def require(
        self, check: str, claim: str, found: Difference, advice: Any = None
    ) -> float:
        """Raises if a comparison found a difference; otherwise returns it.

        Args:
            check: str. The name of the check.
            claim: str. What must be the case.
            found: the comparison.
            advice: str, or a function that returns one: what the author of the
                layer should look at. It is called only if the check failed.
        """
        if not found:
            return found.largest
        if callable(advice):
            advice = advice(found)
        raise ConformanceError(
            check,
            f"{claim}\n"
            f"  Object: {self}\n"
            f"  Largest difference: {found.largest:.3g} (allowed: "
            f"{found.allowed:.2g}), {found.place}.\n"
            f"  {advice or ''}",
            found.largest,
        )


def as_index(kind: str, position: Any, batch_size: int) -> Any:
    """A position as an int, an array of rank 0, or one with an entry per row."""
    if kind == INT:
        return int(position)
    if kind == SCALAR:
        return np.asarray(position, "int32")
    return np.broadcast_to(np.asarray(position, "int32"), (batch_size,)).copy()


def part(inputs: Any, start: int, size: int) -> Any:
    """Some positions of all rows."""
    return tree.map_structure(lambda x: x[:, start : start + size], inputs)


def gather(inputs: Any, positions: np.ndarray) -> Any:
    """The positions `(batch, n)` of each row."""

    def pick(x: np.ndarray) -> np.ndarray:
        return x[np.arange(len(x))[:, None], positions]

    return tree.map_structure(pick, inputs)


def replace(inputs: Any, other: Any, where: np.ndarray) -> Any:
    """The inputs, where a `(batch, length)` condition holds those of another."""

    def pick(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        condition = where.reshape(where.shape + (1,) * (x.ndim - 2))
        return np.where(condition, y, x)

    return tree.map_structure(pick, inputs, other)


def _length(inputs: Any) -> int:
    return tree.flatten(inputs)[0].shape[1]


def _tensors(x: Any) -> Any:
    return None if x is None else tree.map_structure(ops.convert_to_tensor, x)


def _outputs(outputs: Any, length: int) -> list[np.ndarray]:
    return [to_numpy(x) for x in positional(outputs, length)]
