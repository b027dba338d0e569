"""Checks of what a layer may depend on: caches, state, later tokens, other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops, tree

from attention.contract.arguments import describe
from attention.contract.checks import UpdatedCacheError
from attention.contract.sizes import is_tensor
from attention.testing.backends import to_numpy
from attention.testing.probe import ROWS, Difference, Probe, as_index, ranges
from attention.testing.running import ConformanceError
from attention.testing.sequences import part, replace


def check_cache(probe: Probe) -> None:
    """Caches are zeros, batch axis first, and keep structure, shapes and dtypes."""
    _check_new_cache(probe)
    _call_with_cache(probe)
    # A cache that leaves its dtype often does so in low precision only.
    try:
        _call_with_cache(probe.under("mixed_bfloat16"))
    except ConformanceError:
        raise
    except Exception as error:
        # Another check reports what else goes wrong in low precision.
        if isinstance(error, UpdatedCacheError):
            probe.subject.fail(f"Under the dtype policy mixed_bfloat16: {error}")


def _check_new_cache(probe: Probe) -> None:
    subject, rows = probe.subject, probe.rows
    cache = probe.create_cache()
    wider = probe.create_cache(rows=rows + 1)
    shorter = probe.create_cache(length=max(1, probe.length // 2))
    for other, what in ((wider, "another batch size"), (shorter, "another length")):
        try:
            tree.assert_same_structure(cache, other)
        except (ValueError, TypeError):
            subject.fail(
                f"`create_cache` of {subject} must return the same structure for "
                f"every size. It returned {describe(cache)}, and for {what} "
                f"{describe(other)}."
            )
    for (path, leaf), wide in zip(tree.flatten_with_path(cache), tree.flatten(wider)):
        name = f"{leaf_name(path)} of {subject}"
        if not is_tensor(leaf):
            subject.fail(
                f"A cache is a pytree of tensors, but {name} is {describe(leaf)}. "
                "Keep settings on the layer, not in its cache."
            )
        shape, wide_shape = tuple(leaf.shape), tuple(wide.shape)
        if shape[:1] != (rows,) or wide_shape != (rows + 1, *shape[1:]):
            subject.fail(
                "The first axis of every tensor of a cache is the batch, so that "
                f"rows can be taken out and reordered. For {rows} rows {name} has "
                f"shape {shape}, for {rows + 1} rows {wide_shape}."
            )
        largest = float(np.abs(to_numpy(leaf)).max(initial=0))
        if largest != 0:
            subject.fail(
                "A new cache is all zeros: no past. But the tensor of shape "
                f"{shape} in {name} is not.",
                largest,
            )


def _call_with_cache(probe: Probe) -> None:
    # A cached layer checks by itself what it returns for its cache.
    _, cache = probe.prefill(probe.head)
    probe.step(probe.token, cache, as_index(ROWS, probe.size, probe.rows))


def check_state(probe: Probe) -> None:
    """Calls leave nothing on the layer, nor in the cache they were given."""
    subject, size = probe.subject, probe.size
    # Not compiled: what is kept on the layer would be hidden, or a leak.
    eager = Probe(subject, subject.new(like=probe.made), compiled=False)
    head, token = probe.head, probe.token
    _, cache = eager.prefill(head)

    def outputs() -> list[tuple]:
        return [
            ("a call on one token with a cache", eager.step(token, cache, size)[0]),
            ("a prefill", eager.prefill(head)[0]),
            ("a call without a cache", eager.full(head)),
        ]

    given = [to_numpy(x).copy() for x in tree.flatten(cache)]
    weights = [to_numpy(x).copy() for x in eager.made.weights]
    before = outputs()
    attributes = _attributes(eager.made)
    # Another sequence, with a cache and without; then the same calls again.
    other = part(probe.other_inputs, 0, size)
    _, other_cache = eager.prefill(other)
    eager.step(part(probe.other_inputs, size, 1), other_cache, size)
    eager.full(other)

    def advice(found: Difference) -> str:
        now = _attributes(eager.made).items()
        changed = [f"`{x}`" for x, y in now if not _is_same(attributes.get(x), y)]
        kept = f" These attributes changed meanwhile: {', '.join(changed)}."
        return (
            "What a call knows of the past comes from `cache` and "
            "`cache_update_index` alone; nothing is kept on the layer, as one layer "
            f"serves many sequences.{kept if changed else ''}"
        )

    for (name, first), (_, second) in zip(before, outputs()):
        claim = (
            "The same call must give the same outputs, whatever else was called "
            f"between; {name} did not."
        )
        eager.require(claim, eager.compare(second, first), advice)
    for variable, value in zip(eager.made.weights, weights):
        if not np.array_equal(to_numpy(variable), value):
            subject.fail(
                f"The weight '{variable.path}' of {subject} changed during "
                "inference. Keep what belongs to a sequence in the cache."
            )
    for (path, leaf), value in zip(tree.flatten_with_path(cache), given):
        is_float = value.dtype.kind == "f"
        if not np.array_equal(to_numpy(leaf), value, equal_nan=is_float):
            subject.fail(
                f"A call of {subject} changed the cache it was given, in "
                f"{leaf_name(path)}. The cache is a value: return an updated one, "
                "or two continuations of one past get mixed up."
            )


def _attributes(layer: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(layer).items() if not k.startswith("_")}


def _is_same(old: Any, new: Any) -> bool:
    if isinstance(new, (int, float, str, tuple)):
        return type(old) is type(new) and old == new
    return old is new


def check_causality(probe: Probe) -> None:
    """A changed token moves no earlier output."""
    length, size = probe.length, probe.size

    def prefill(inputs: Any) -> list[np.ndarray]:
        return probe.prefill(part(inputs, 0, size))[0]

    calls: list[tuple[int, Any, str, Any]] = [
        (start, probe.full, "a call without a cache", probe.expected)
        for start in sorted({1, length // 2, length - 1})
    ]
    calls.append((size // 2, prefill, "a prefill", prefill(probe.inputs)))
    for start, call, what, expected in calls:
        later = np.broadcast_to(np.arange(length) >= start, (probe.rows, length))
        changed = call(replace(probe.inputs, probe.other_inputs, later))
        earlier = ~later[:, : expected[0].shape[1]]
        found = probe.compare(changed, expected, earlier)
        probe.require(
            f"Tokens from position {start} on were changed, and outputs at the "
            f"earlier positions {ranges(found.positions)} moved, in {what}.",
            found,
            "A token may depend on itself and on earlier ones. If only the output "
            "just before the change moved, the causal mask is off by one (`<` where "
            "`<=` is meant, or queries and keys counted from different starts); if "
            "all moved, there is no mask at all, or something is averaged over the "
            "whole sequence.",
        )


def check_rows(probe: Probe) -> None:
    """Rows don't affect each other, and reordering a cache reorders the outputs."""
    rows, size = probe.rows, probe.size
    first = np.broadcast_to((np.arange(rows) == 0)[:, None], (rows, probe.length))
    # Each row has an index of its own, although they are all the same.
    index = as_index(ROWS, size, rows)

    def outputs(inputs: Any) -> tuple:
        prefilled, cache = probe.prefill(part(inputs, 0, size))
        stepped, _ = probe.step(part(inputs, size, 1), cache, index)
        return probe.full(inputs), prefilled, stepped, cache

    def advice(found: Difference) -> str:
        return (
            f"{found.rows} Look for a reshape or transpose in which the batch axis "
            "does not stay the first, for a mean or a norm over the batch, or for "
            "one row's `cache_update_index` used for all."
        )

    *expected, cache = outputs(probe.inputs)
    *changed, _ = outputs(replace(probe.inputs, probe.other_inputs, first))
    calls = ("a call without a cache", "a prefill", "a call on one token with a cache")
    for call, a, b in zip(calls, changed, expected):
        found = probe.compare(a, b, ~first[:, : b[0].shape[1]])
        claim = f"Row 0 was changed, and outputs of other rows moved, in {call}."
        probe.require(claim, found, advice)

    order = np.roll(np.arange(rows), 1)
    reordered = tree.map_structure(lambda x: ops.take(x, order, axis=0), cache)
    token = tree.map_structure(lambda x: x[order], probe.token)
    stepped, _ = probe.step(token, reordered, index)
    probe.require(
        f"The rows of the cache and of the next token were reordered as {order}, but "
        "the outputs are not the earlier ones in this order.",
        probe.compare(stepped, [x[order] for x in expected[2]], None, size),
        "Everything that belongs to a row must be in the cache, along the first axis "
        "of its tensors. Beam search relies on it.",
    )


def leaf_name(path: tuple) -> str:
    """Returns where in a cache a tensor is, as in `cache['key']`."""
    return "cache" + "".join(f"[{key!r}]" for key in path)
