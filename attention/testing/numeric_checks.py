"""Checks of compiled calls, low precision and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops, tree

from attention.contract.types import Index, Mask
from attention.testing.backends import gradients
from attention.testing.padding_checks import loud, ragged_mask
from attention.testing.probe import ROWS, SCALAR, Probe, as_index
from attention.testing.sequences import join, part, positional_tensors, replace, tensors

POLICIES = ("mixed_bfloat16", "bfloat16", "mixed_float16")


def check_compiled(probe: Probe) -> None:
    """Compiled calls give what eager ones give: XLA, or jit on JAX."""
    rows, size = probe.rows, probe.size
    eager = Probe(probe.subject, probe.made, compiled=False)
    # On JAX all checks run compiled calls; what is compiled already is used.
    both = eager, probe if probe.compiled else Probe(probe.subject, probe.made, True)
    mask = ragged_mask(rows, size) if probe.subject.takes("padding_mask") else None

    def compare(outputs: list, what: str, where: Any = None, start: Index = 0) -> None:
        probe.require(
            f"A compiled call must give what an eager one gives: {what}.",
            probe.compare(outputs[1], outputs[0], where, start),
            "In a compiled call (XLA, or jit on JAX) sizes and indices may be symbols: "
            "no Python `if` or `int()` on a tensor, no NumPy on one, and nothing that "
            "was computed for another index may be kept.",
        )

    compare([x.full(probe.head) for x in both], "a call without a cache")
    for kind, given in ((ROWS, mask), (SCALAR, None)):
        found = [x.prefill(probe.head, given) for x in both]
        compare([outputs for outputs, _ in found], "a prefill", given)
        index = as_index(kind, size, rows) if given is None else given.sum(axis=1)
        # Twice, at different positions: one compiled function serves both.
        for now in (index, index + 1):
            pairs = zip(both, found)
            found = [x.step(probe.token, cache, now) for x, (_, cache) in pairs]
            what = f"a token after a prefill, where the index is {kind}"
            compare([outputs for outputs, _ in found], what, start=now)


def check_low_precision(probe: Probe) -> None:
    """Low precision stays near full precision, and gives no NaN."""
    subject, rows, size = probe.subject, probe.rows, probe.size
    advice = (
        "Sums over many terms (softmax, norms, states that accumulate) are computed "
        "in float32 and cast back; a mask must not overflow: -1e9 is -inf in float16."
    )
    for policy in POLICIES:
        low = probe.under(policy)
        if subject.dtype not in ("float32", "float64"):
            low.tolerance = max(low.tolerance, probe.tolerance)
        inputs, mask = low.inputs, None
        if subject.takes("padding_mask"):
            mask = ragged_mask(rows, probe.length)
            mask[-1] = False
            # Not loud: what float16 can't hold is no fault of the layer.
            inputs = replace(inputs, low.other_inputs, ~mask)
        outputs = low.full(inputs, mask)
        if not all(np.isfinite(x).all() for x in outputs):
            subject.fail(
                f"Under the dtype policy {policy}, outputs of {subject} are NaN or "
                f"infinite, in a call with a row of padding alone.\n  {advice}",
                np.inf,
            )
        head, cache = low.prefill(low.head)
        tail, _ = low.step(low.token, cache, as_index(ROWS, size, rows))
        for found, what, where in (
            (outputs, "a call with padding", mask),
            (join(head, tail), "a prefill and a token with a cache", None),
        ):
            expected = part(probe.expected, 0, found[0].shape[1])
            low.require(
                f"Under the dtype policy {policy}, {what} must stay near what it is "
                f"under {subject.dtype} with the same weights.",
                low.compare(found, expected, where),
                advice,
            )


def check_gradients(probe: Probe) -> None:
    """Gradients are finite, and the same with a cache and without."""
    subject, made = probe.subject, probe.made
    rows, length, size = probe.rows, probe.length, probe.size
    variables = list(made.trainable_variables)
    names = [v.path for v in variables]
    names += ["the inputs" for x in tree.flatten(probe.inputs) if x.dtype.kind == "f"]
    if not names:
        return
    rng = np.random.default_rng([subject.seed, 5])
    weights = [rng.normal(size=x.shape).astype("float32") for x in probe.expected]

    def loss(outputs: Any, start: int, mask: Mask | None = None) -> Any:
        """Returns a random sum of the outputs of real tokens."""
        total: Any = 0.0
        until = tree.flatten(outputs)[0].shape[1]
        for x, weight in zip(positional_tensors(outputs, until), weights):
            weight = weight[:, start : start + until]
            if mask is not None:
                weight = weight * mask.reshape(mask.shape + (1,) * (weight.ndim - 2))
            total = total + ops.sum(ops.cast(x, "float32") * tensors(weight))
        return total

    def differentiate(run: Callable, inputs: Any, how: str) -> list:
        """Returns the gradients for the weights and inputs of floating point."""
        subject.doing = f"differentiated {how}"
        leaves = tree.flatten(inputs)
        floats = [x for x in leaves if x.dtype.kind == "f"]

        def function(given: list) -> Any:
            rest = iter(given)
            flat = [next(rest) if x.dtype.kind == "f" else tensors(x) for x in leaves]
            return run(tree.pack_sequence_as(inputs, flat))

        found = gradients(function, variables, floats)
        for name, value in zip(names, found):
            if value is not None and not np.isfinite(value).all():
                subject.fail(
                    f"The gradient for '{name}' of {subject} must be finite, but "
                    f"{how} it is not.\n  The gradient of `where` is NaN if the "
                    "branch that was not taken is: replace the bad values before the "
                    "division, root or softmax, not after it.",
                    np.inf,
                )
        return found

    def cached(inputs: Any) -> Any:
        cache = subject.create_cache(made, rows, length)
        head = part(inputs, 0, size)
        outputs, cache = subject.call_with_cache(made, head, cache, 0, None)
        rest, index = part(inputs, size, length - size), np.asarray(size, "int32")
        tail, _ = subject.call_with_cache(made, rest, cache, tensors(index), None)
        return loss(outputs, 0) + loss(tail, size)

    def uncached(inputs: Any, mask: Any = None) -> Any:
        return loss(subject.call(made, inputs, tensors(mask)), 0, mask)

    expected = differentiate(uncached, probe.inputs, "without a cache")
    how = "through a prefill and a chunk with a cache"
    for name, *both in zip(names, differentiate(cached, probe.inputs, how), expected):
        flat = [np.zeros((1, 1, 1)) if x is None else x.reshape(1, 1, -1) for x in both]
        a, b = np.broadcast_arrays(*flat)
        # Sums over the whole batch: their errors add up.
        found = probe.compare([a], [b], slack=10.0)
        found.place = f"in element {int(np.abs(a - b).argmax())} of the gradient"
        probe.require(
            f"The gradients for '{name}' must be the same {how} as through one call "
            "without a cache.",
            found,
            "What is read from the cache must be differentiable: no `stop_gradient`, "
            "no NumPy, no variable between.",
        )
    if subject.takes("padding_mask"):
        mask = ragged_mask(rows, length)
        mask[-1] = False
        inputs = loud(probe.inputs, probe.other_inputs, mask)
        differentiate(lambda x: uncached(x, mask), inputs, "with padding")
