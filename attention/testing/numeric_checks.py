"""Checks of compiled calls, low precision and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops, tree

from attention.testing.backends import gradients, has_compiler
from attention.testing.comparing import Difference
from attention.testing.failure import ConformanceError
from attention.testing.padding_checks import loud, ragged_mask
from attention.testing.probe import ROWS, SCALAR, Probe, as_index, part, replace
from attention.testing.subjects import Subject, positional, takes_padding_mask

POLICIES = ("mixed_bfloat16", "bfloat16", "mixed_float16")


def check_compiled(subject: Subject, probe: Probe) -> float | None:
    """Compiled calls give what eager ones give: XLA, or jit on JAX."""
    if not has_compiler():
        return None
    rows, size = subject.batch_size, subject.prefill_size
    eager = Probe(subject, probe.made, compiled=False)
    # On JAX all checks run compiled calls; what is compiled already is used.
    compiled = probe if probe.compiled else Probe(subject, probe.made, compiled=True)
    head, token = part(probe.inputs, 0, size), part(probe.inputs, size, 1)
    mask: np.ndarray | None = None
    index = np.full(rows, size)
    if takes_padding_mask(probe.made):
        mask = ragged_mask(rows, size)
        index = mask.sum(axis=1)
    worst = 0.0

    def compare(actual: list, expected: list, start: Any, what: str) -> None:
        nonlocal worst
        where = mask if what == "a prefill" else None
        found = probe.compare(actual, expected, where, positions=start)
        claim = f"A compiled call must give what an eager one gives: {what}."
        advice = (
            "In a compiled call (XLA, or jit on JAX) sizes and indices may be symbols: "
            "no Python `if` or `int()` on a tensor, no NumPy on one, and nothing that "
            "was computed for another index may be kept."
        )
        worst = max(worst, probe.require("compiled", claim, found, advice))

    compare(compiled.full(head), eager.full(head), 0, "a call without a cache")
    expected, cache = eager.step(head, eager.create_cache(), 0, mask)
    outputs, compiled_cache = compiled.step(head, eager.create_cache(), 0, mask)
    compare(outputs, expected, 0, "a prefill")
    _, same_cache = eager.step(head, eager.create_cache(), 0)
    caches = {ROWS: (cache, compiled_cache, index)}
    caches[SCALAR] = (same_cache, same_cache, np.asarray(size))
    for kind, (old, new, start) in caches.items():
        # Twice, at different positions: one compiled function serves both.
        for now in (start, start + 1):
            expected, old = eager.step(token, old, now)
            outputs, new = compiled.step(token, new, now)
            what = f"a token after a prefill, where the index is {kind}"
            compare(outputs, expected, now, what)
    return worst


def _index(x: np.ndarray) -> Any:
    return ops.convert_to_tensor(x.astype("int32"))


def check_low_precision(subject: Subject, probe: Probe) -> float:
    """Low precision stays near full precision, and gives no NaN."""
    size, rows, length = subject.prefill_size, subject.batch_size, subject.length
    mask: np.ndarray | None = None
    if takes_padding_mask(probe.made):
        mask = ragged_mask(rows, length)
        mask[-1] = False
    worst = 0.0
    for policy in POLICIES:
        low = probe.under(policy)
        if subject.dtype not in ("float32", "float64"):
            low.tolerance = max(low.tolerance, probe.tolerance)

        def advice(found: Difference | None) -> str:
            return (
                "Sums over many terms (softmax, norms, states that accumulate) are "
                "computed in float32 and cast back; a mask must not overflow: "
                "-1e9 is -inf in float16."
            )

        inputs = low.inputs
        if mask is not None:
            # Not loud: what float16 can't hold is no fault of the layer.
            inputs = replace(inputs, low.other_inputs, ~mask)
        outputs = low.full(inputs, mask)
        if not all(np.isfinite(x).all() for x in outputs):
            raise ConformanceError(
                "low_precision",
                f"Under the dtype policy {policy}, outputs of {probe} are NaN or "
                f"infinite, in a call with a row of padding alone.\n  {advice(None)}",
                np.inf,
            )
        calls: list[tuple] = [(outputs, "a call with padding", mask)]
        head, cache = low.step(part(low.inputs, 0, size), low.create_cache(), 0)
        index = as_index(ROWS, size, rows)
        tail, _ = low.step(part(low.inputs, size, 1), cache, index)
        joined = [np.concatenate(both, axis=1) for both in zip(head, tail)]
        calls.append((joined, "a prefill and a token with a cache", None))
        for outputs, what, where in calls:
            until = outputs[0].shape[1]
            expected = [x[:, :until] for x in probe.expected]
            found = low.compare(outputs, expected, where)
            claim = (
                f"Under the dtype policy {policy}, {what} must stay near what it is "
                f"under {subject.dtype} with the same weights."
            )
            worst = max(worst, low.require("low_precision", claim, found, advice))
    return worst


def check_gradients(subject: Subject, probe: Probe) -> float:
    """Gradients are finite, and the same with a cache and without."""
    made, rows, length = probe.made, subject.batch_size, subject.length
    size = subject.prefill_size
    rng = np.random.default_rng([subject.seed, 5])
    weights = [rng.normal(size=x.shape).astype("float32") for x in probe.expected]
    leaves = tree.flatten(probe.inputs)
    is_float = [x.dtype.kind == "f" for x in leaves]
    floats = [x for x, chosen in zip(leaves, is_float) if chosen]
    variables = list(made.trainable_variables)
    if not variables and not floats:
        return 0.0

    def with_floats(tensors: list, source: list) -> Any:
        remaining = iter(tensors)
        flat = [
            next(remaining) if chosen else ops.convert_to_tensor(x)
            for x, chosen in zip(source, is_float)
        ]
        return tree.pack_sequence_as(probe.inputs, flat)

    def loss(outputs: Any, start: int, mask: Any = None) -> Any:
        total: Any = 0.0
        until = tree.flatten(outputs)[0].shape[1]
        for x, weight in zip(positional(outputs, until), weights):
            weight = weight[:, start : start + until]
            if mask is not None:
                weight = weight * mask.reshape(mask.shape + (1,) * (weight.ndim - 2))
            weight = ops.convert_to_tensor(weight.astype("float32"))
            total = total + ops.sum(ops.cast(x, "float32") * weight)
        return total

    def full(tensors: list) -> Any:
        return loss(subject.call(made, with_floats(tensors, leaves), None), 0)

    def cached(tensors: list) -> Any:
        inputs = with_floats(tensors, leaves)
        cache = subject.create_cache(made, rows, length)
        head, cache = subject.call_with_cache(
            made, part(inputs, 0, size), cache, 0, None
        )
        rest = part(inputs, size, length - size)
        index = _index(np.asarray(size))
        tail, _ = subject.call_with_cache(made, rest, cache, index, None)
        return loss(head, 0) + loss(tail, size)

    names = [v.path for v in variables] + ["the inputs"] * len(floats)
    probe.doing = "differentiated without a cache"
    expected = gradients(full, variables, floats)
    _require_finite(probe, names, expected, "a call without a cache")
    probe.doing = "differentiated through a prefill and a chunk with a cache"
    actual = gradients(cached, variables, floats)
    worst = 0.0
    for name, a, b in zip(names, actual, expected):
        shaped = [
            np.zeros((1, 1, 1)) if x is None else x.reshape(1, 1, -1) for x in (a, b)
        ]
        a, b = np.broadcast_arrays(*shaped)
        # Sums over the whole batch: their errors add up.
        found = probe.compare([a], [b], slack=10.0)
        claim = (
            f"The gradients for '{name}' must be the same through a prefill and a "
            "chunk with a cache as through one call without a cache."
        )
        advice = (
            "What is read from the cache must be differentiable: no "
            "`stop_gradient`, no NumPy, no variable between."
        )
        found.place = f"in element {int(np.abs(a - b).argmax())} of the gradient"
        worst = max(worst, probe.require("gradients", claim, found, advice))

    if takes_padding_mask(made):
        mask = ragged_mask(rows, length)
        mask[-1] = False
        padded = tree.flatten(loud(probe.inputs, probe.other_inputs, mask))

        def masked(tensors: list) -> Any:
            inputs = with_floats(tensors, padded)
            given = ops.convert_to_tensor(mask)
            return loss(subject.call(made, inputs, given), 0, mask)

        probe.doing = "differentiated with padding"
        values = [x for x, chosen in zip(padded, is_float) if chosen]
        found_gradients = gradients(masked, variables, values)
        _require_finite(probe, names, found_gradients, "a call with padding")
    return worst


def _require_finite(probe: Probe, names: list, values: list, what: str) -> None:
    for name, value in zip(names, values):
        if value is not None and not np.isfinite(value).all():
            raise ConformanceError(
                "gradients",
                f"The gradient for '{name}' of {probe} must be finite, but in {what} "
                "it is not.\n  The gradient of `where` is NaN if the branch that was "
                "not taken is: replace the bad values before the division, root or "
                "softmax, not after it.",
                np.inf,
            )
