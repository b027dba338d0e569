"""One object under test, and all ways of calling it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from attention.contract.segments import SegmentScope
from attention.contract.types import Cache, Index, Mask
from attention.testing.backends import compile_call, without_gradients
from attention.testing.running import ConformanceError
from attention.testing.sequences import gather, join, part, positional, tensors
from attention.testing.subjects import Subject

# The largest difference between two ways to compute the same, for values of
# size 1, by the dtype that is computed in.
_TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "float16": 0.015, "bfloat16": 0.08}

INT, SCALAR, ROWS = "an int", "a scalar tensor", "one entry per row"

# Outputs: arrays of shape `(batch, length, ...)`.
Outputs = list[np.ndarray]


class Probe:
    """Calls an object on parts of a sequence, and compares what it gives.

    If it is `compiled`, calls are compiled: by XLA, or jit on JAX. By default on JAX
    only, where compiling a call is faster than compiling its operations.
    """

    def __init__(
        self, subject: Subject, made: keras.layers.Layer, compiled: bool | None = None
    ) -> None:
        self.subject, self.made = subject, made
        self.rows, self.length = subject.batch_size, subject.length
        self.size = subject.prefill_size
        if compiled is None:
            compiled = keras.config.backend() == "jax"
        self.compiled = compiled
        self._functions: dict[Any, Any] = {}
        self._under: dict[str, Probe] = {}
        dtype = getattr(made, "compute_dtype", "float32")
        if dtype not in _TOLERANCES or keras.config.floatx() != "float64" == dtype:
            dtype = "float32"
        self.tolerance = max(_TOLERANCES[dtype], subject.tolerance)

    # === Calls ===

    def create_cache(self, length: int | None = None, rows: int | None = None) -> Cache:
        rows, length = rows or self.rows, length or self.length
        self.subject.doing = f"asked for `create_cache({rows}, {length})`"
        return self.subject.create_cache(self.made, rows, length)

    def full(
        self, inputs: Any, mask: Mask | None = None, **masks: np.ndarray
    ) -> Outputs:
        """Returns the outputs of one call without a cache."""
        length = _length(inputs)
        given = [] if mask is None else ["padding_mask"]
        named = "".join(f" and `{name}`" for name in [*given, *masks])
        self.subject.doing = f"called on {length} tokens{named} without a cache"
        call = self._function("call", None)
        outputs = call(tensors(inputs), None, tensors(mask), None, tensors(masks))
        return positional(outputs, length)

    def step(
        self, inputs: Any, cache: Cache, index: Index, mask: Mask | None = None
    ) -> tuple[Outputs, Cache]:
        """Returns the outputs of a call with a cache, and the updated cache."""
        length = _length(inputs)
        masked = "" if mask is None else " and `padding_mask`"
        static = index if isinstance(index, int) else None
        kind = ROWS if np.ndim(index) else SCALAR if static is None else INT
        self.subject.doing = (
            f"called on {length} tokens{masked} with a cache and {kind} as "
            "`cache_update_index`"
        )
        dynamic = tensors(np.asarray(index, "int32")) if static is None else None
        call = self._function("call_with_cache", static)
        outputs, cache = call(tensors(inputs), cache, tensors(mask), dynamic, {})
        return positional(outputs, length), cache

    def prefill(
        self, inputs: Any, mask: Mask | None = None, index: Index = 0
    ) -> tuple[Outputs, Cache]:
        """Returns the outputs of a call with a new cache, and the updated cache."""
        return self.step(inputs, self.create_cache(), index, mask)

    def _function(self, name: str, static: int | None) -> Any:
        """Returns a function of tensors alone, which can be compiled."""
        if (name, static) in self._functions:
            return self._functions[name, static]
        subject, made = self.subject, self.made

        def call(
            inputs: Any, cache: Cache, mask: Mask, index: Index, masks: Any
        ) -> Any:
            if name == "call":
                masks = dict(masks or {})
                with SegmentScope(masks.pop("segment_ids", None)):
                    return subject.call(made, inputs, mask, **masks)
            index = static if index is None else index
            return subject.call_with_cache(made, inputs, cache, index, mask)

        function = eager = without_gradients(call)
        if self.compiled:
            compiled = compile_call(eager)

            def function(*arguments: Any) -> Any:
                try:
                    return compiled(*arguments)
                except Exception as error:
                    # Is it the layer's mistake, or that of its being compiled?
                    eager(*arguments)
                    raise ConformanceError(
                        "compiled",
                        f"{subject} runs eagerly, but raised {type(error).__name__} "
                        f"when it was compiled, {subject.doing}.\n  {error}",
                    ) from error

        self._functions[name, static] = function
        return function

    def run(
        self, inputs: Any, sizes: Sequence[int], kinds: tuple[str, ...]
    ) -> tuple[Outputs, list[Cache]]:
        """Runs a sequence in chunks of some sizes, each at an index of its kind.

        The last kind is that of all chunks that follow. Returns the joined outputs, and
        the cache after each chunk.
        """
        cache, start = self.create_cache(), 0
        chunks, caches = [], []
        for number, size in enumerate(sizes):
            index = as_index(kinds[min(number, len(kinds) - 1)], start, self.rows)
            outputs, cache = self.step(part(inputs, start, size), cache, index)
            chunks.append(outputs)
            caches.append(cache)
            start += size
        return join(*chunks), caches

    # === Inputs and outputs, computed once ===

    @functools.cached_property
    def inputs(self) -> Any:
        return self.subject.sample(seed=1)

    @functools.cached_property
    def other_inputs(self) -> Any:
        """Inputs that differ in every token."""
        return self.subject.sample(seed=2)

    @functools.cached_property
    def head(self) -> Any:
        """The inputs of a prefill."""
        return part(self.inputs, 0, self.size)

    @functools.cached_property
    def token(self) -> Any:
        """The input after them."""
        return part(self.inputs, self.size, 1)

    @functools.cached_property
    def expected(self) -> Outputs:
        """The outputs of the whole sequence without a cache."""
        return self.full(self.inputs)

    @functools.cached_property
    def token_by_token(self) -> tuple[Outputs, list[Cache]]:
        """The outputs and caches of single tokens, from an empty cache."""
        return self.run(self.inputs, [1] * self.length, (SCALAR,))

    def under(self, policy: str) -> Probe:
        """Returns the same object with the same weights under another policy."""
        if policy not in self._under:
            self.subject.doing = f"made under the dtype policy {policy}"
            made = self.subject.new(policy, like=self.made)
            self._under[policy] = Probe(self.subject, made)
        return self._under[policy]

    # === Comparisons ===

    def compare(
        self, actual: Outputs, expected: Outputs, *where: Any, slack: float = 1.0
    ) -> Difference:
        """Compares as `_difference` does, given `where` and `positions`, too."""
        return _difference(actual, expected, self.tolerance * slack, *where)

    def compare_rows(
        self, cache: Cache, index: np.ndarray, size: int, mask: Mask | None = None
    ) -> tuple[Difference, Cache]:
        """Runs the next tokens of rows that are at positions of their own.

        Returns the comparison with the outputs without a cache, and the updated cache.
        """
        positions = np.minimum(index[:, None] + np.arange(size), self.length - 1)
        outputs, cache = self.step(gather(self.inputs, positions), cache, index, mask)
        return self.compare(
            outputs, gather(self.expected, positions), mask, index
        ), cache

    def require(self, claim: str, found: Difference, advice: Any) -> None:
        """Notes the difference that a comparison found, and fails if it is too large.

        `advice` says what the author of the layer should look at: a text, or a function
        of the comparison that returns one, which is called only if the check failed.
        """
        if found:
            advice = advice(found) if callable(advice) else advice
            self.subject.fail(
                f"{claim}\n  Object: {self.subject}\n"
                f"  Largest difference: {found.largest:.3g} (allowed: "
                f"{found.allowed:.2g}), {found.place}.\n  {advice}",
                found.largest,
            )
        self.subject.largest = max(self.subject.largest, found.largest)


@dataclasses.dataclass
class Difference:
    """Where two arrays of shape `(batch, length, ...)` differ the most.

    `wrong`, boolean `(batch, length)`, marks what is off by more than `allowed`.
    """

    largest: float
    place: str
    wrong: np.ndarray
    allowed: float

    def __bool__(self) -> bool:
        return bool(self.wrong.any())

    @property
    def rows(self) -> str:
        """The rows that are wrong, for a message."""
        return f"Rows that are wrong: {ranges(np.asarray(self.wrong.any(axis=1)))}."

    @property
    def positions(self) -> np.ndarray:
        """Boolean, `(length,)`: the positions that are wrong."""
        return np.asarray(self.wrong.any(axis=0))


def _difference(
    actual: list[np.ndarray],
    expected: list[np.ndarray],
    relative: float,
    where: np.ndarray | None = None,
    positions: Any = 0,
) -> Difference:
    """Compares outputs, arrays `(batch, length, ...)`, position by position.

    `relative` is the difference that is allowed, for values of size 1; `where`,
    `(batch, length)`, marks the outputs that count; and `positions` is the position in
    the sequence of the first output, one for all rows or one for each.
    """
    found = []
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != b.shape:
            place = f"in shape: {a.shape} instead of {b.shape}"
            return Difference(np.inf, place, np.ones(b.shape[:2], bool), 0.0)
        a, b = a.astype("float64"), b.astype("float64")
        with np.errstate(invalid="ignore"):
            gap = np.abs(a - b)
        # Infinite where expected, too, is no difference; NaN always is one.
        gap = np.where(a == b, 0.0, np.where(np.isnan(gap), np.inf, gap))
        if where is not None:
            gap = np.where(where.reshape(where.shape + (1,) * (gap.ndim - 2)), gap, 0.0)
        allowed = relative * np.abs(b[np.isfinite(b)]).max(initial=1.0)
        wrong = (gap > allowed).any(axis=tuple(range(2, gap.ndim)))
        if not gap.size:
            found.append(Difference(0.0, "nowhere", wrong, allowed))
            continue
        index = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
        row, position, *feature = index
        start = np.broadcast_to(positions, len(gap))[row]
        place = f"in row {row}, at position {position + start}"
        place += f", feature {', '.join(map(str, feature))}" if feature else ""
        place += f": got {a[index]:.6g}, expected {b[index]:.6g}"
        place = f"in output {number}, {place}" if len(actual) > 1 else place
        found.append(Difference(float(gap[index]), place, wrong, allowed))
    return max(found, key=lambda x: x.largest)


def ranges(flags: np.ndarray) -> str:
    """Returns the indices at which flags are set, as in `"3, 8-23"`."""
    indices = np.flatnonzero(flags)
    if not len(indices):
        return "none"
    parts = np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)
    texts = [f"{x[0]}" if len(x) == 1 else f"{x[0]}-{x[-1]}" for x in parts]
    return ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "")


def as_index(kind: str, position: Any, batch_size: int) -> Any:
    """Returns a position as an int, or an array of rank 0 or with an entry per row."""
    if kind == INT:
        return int(position)
    position = np.asarray(position, "int32")
    return position if kind == SCALAR else np.broadcast_to(position, batch_size).copy()


def _length(inputs: Any) -> int:
    return tree.flatten(inputs)[0].shape[1]
