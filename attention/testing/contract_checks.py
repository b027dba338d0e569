"""Checks of what a layer may depend on: caches, state, later tokens, other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops, tree

from attention.contract.arguments import describe
from attention.contract.checks import UpdatedCacheError
from attention.testing.backends import copy_arrays, is_tensor, to_numpy
from attention.testing.comparing import Difference, ranges
from attention.testing.failure import ConformanceError
from attention.testing.probe import INT, ROWS, Probe, as_index, part, replace
from attention.testing.subjects import Subject


def check_cache(subject: Subject, probe: Probe) -> float:
    """Caches are zeros, batch axis first, and keep structure, shapes and dtypes."""
    _check_new_cache(subject, probe)
    _check_updated_caches(subject, probe)
    # A cache that leaves its dtype often does so in low precision only.
    try:
        _check_updated_caches(subject, probe.under("mixed_bfloat16"))
    except UpdatedCacheError as error:
        message = f"Under the dtype policy mixed_bfloat16: {error}"
        raise ConformanceError("cache", message) from error
    except ConformanceError:
        raise
    except Exception:
        # What else goes wrong in low precision is for another check to say.
        return 0.0
    return 0.0


def _check_new_cache(subject: Subject, probe: Probe) -> None:
    rows, length = subject.batch_size, subject.length
    cache = probe.create_cache()
    wider = probe.create_cache(rows=rows + 1)
    shorter = probe.create_cache(length=max(1, length // 2))
    for other, what in ((wider, "another batch size"), (shorter, "another length")):
        try:
            tree.assert_same_structure(cache, other)
        except (ValueError, TypeError):
            raise ConformanceError(
                "cache",
                f"`create_cache` of {probe} must return the same structure for "
                f"every size. It returned {describe(cache)}, and for {what} "
                f"{describe(other)}.",
            ) from None
    leaves = zip(*map(tree.flatten_with_path, (cache, wider)))
    for (path, leaf), (_, wide) in leaves:
        name = leaf_name(path)
        if not is_tensor(leaf):
            raise ConformanceError(
                "cache",
                f"A cache is a pytree of tensors, but {name} of {probe} is "
                f"{describe(leaf)}. Keep settings on the layer, not in its cache.",
            )
        shape, wide_shape = tuple(leaf.shape), tuple(wide.shape)
        if shape[:1] != (rows,) or wide_shape != (rows + 1, *shape[1:]):
            raise ConformanceError(
                "cache",
                "The first axis of every tensor of a cache is the batch, so that "
                f"rows can be taken out and reordered. For {rows} rows {name} of "
                f"{probe} has shape {shape}, for {rows + 1} rows {wide_shape}.",
            )
        if (to_numpy(leaf) != 0).any():
            raise ConformanceError(
                "cache",
                "A new cache is all zeros: no past. But the tensor of shape "
                f"{shape} in {name} of {probe} is not.",
                float(np.abs(to_numpy(leaf)).max()),
            )


def _check_updated_caches(subject: Subject, probe: Probe) -> None:
    """A cached layer checks this itself; a model may not be made of such."""
    cache = probe.create_cache()
    size = subject.prefill_size
    for index, start, length in ((INT, 0, size), (ROWS, size, 1)):
        index = as_index(index, start, subject.batch_size)
        inputs = part(probe.inputs, start, length)
        _, updated = probe.step(inputs, cache, index)
        tree.assert_same_structure(cache, updated)
        pairs = zip(tree.flatten_with_path(cache), tree.flatten(updated))
        for (path, old), new in pairs:
            if describe(old) != describe(new):
                raise ConformanceError(
                    "cache",
                    "A call must return the cache in the shapes and dtypes in "
                    f"which it got it, but {leaf_name(path)} of {probe} was a "
                    f"{describe(old)} and became a {describe(new)}.",
                )
        cache = updated


def check_state(subject: Subject, probe: Probe) -> float:
    """Calls leave nothing behind on the layer, nor in the cache they were given."""
    # Not compiled: what is kept on the layer would be hidden, or a leak.
    eager = Probe(subject, subject.new(like=probe.made), compiled=False)
    size = subject.prefill_size
    head, token = part(probe.inputs, 0, size), part(probe.inputs, size, 1)
    other_head = part(probe.other_inputs, 0, size)
    other_token = part(probe.other_inputs, size, 1)

    plain = eager.full(head)
    prefilled, cache = eager.step(head, eager.create_cache(), 0)
    given = copy_arrays(cache)
    stepped, _ = eager.step(token, cache, size)
    attributes = _attributes(eager.made)
    weights = copy_arrays(list(eager.made.weights))
    # Another sequence, with a cache and without; then the same calls again.
    _, other_cache = eager.step(other_head, eager.create_cache(), 0)
    eager.step(other_token, other_cache, size)
    eager.full(other_head)
    stepped_again, _ = eager.step(token, cache, size)
    prefilled_again, _ = eager.step(head, eager.create_cache(), 0)
    plain_again = eager.full(head)

    def advice(found: Difference) -> str:
        changed = _changed(attributes, _attributes(eager.made))
        kept = f" These attributes changed meanwhile: {changed}." if changed else ""
        return (
            "What a call knows of the past comes from `cache` and "
            "`cache_update_index` alone; nothing is kept on the layer, as one "
            f"layer serves many sequences.{kept}"
        )

    worst = 0.0
    for name, first, second, start in (
        ("a call on one token with a cache", stepped, stepped_again, size),
        ("a prefill of an empty cache", prefilled, prefilled_again, 0),
        ("a call without a cache", plain, plain_again, 0),
    ):
        found = eager.compare(second, first, positions=start)
        claim = (
            f"The same call must give the same outputs, whatever else was called "
            f"between; {name} did not."
        )
        worst = max(worst, eager.require("state", claim, found, advice))
    for variable, before in zip(eager.made.weights, weights):
        if not np.array_equal(to_numpy(variable), before):
            raise ConformanceError(
                "state",
                f"The weight '{variable.path}' of {eager} changed during inference. "
                "Keep what belongs to a sequence in the cache.",
            )
    for (path, leaf), before in zip(tree.flatten_with_path(cache), tree.flatten(given)):
        if not np.array_equal(
            to_numpy(leaf), before, equal_nan=before.dtype.kind == "f"
        ):
            raise ConformanceError(
                "state",
                f"A call of {eager} changed the cache it was given, in "
                f"{leaf_name(path)}. The cache is a value: return an updated one, "
                "or whoever continues one past in two ways gets them mixed up.",
            )
    return worst


def _attributes(layer: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(layer).items() if not k.startswith("_")}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = [
        name
        for name, value in after.items()
        if name not in before or _differs(before[name], value)
    ]
    return ", ".join(f"`{name}`" for name in names)


def _differs(old: Any, new: Any) -> bool:
    if isinstance(new, (int, float, str, tuple)):
        return type(old) is not type(new) or old != new
    return old is not new


def check_causality(subject: Subject, probe: Probe) -> float:
    """A changed token moves no earlier output."""
    length, size = subject.length, subject.prefill_size
    worst = 0.0

    def advice(found: Difference) -> str:
        return (
            "A token may depend on itself and on earlier ones. If only the output "
            "just before the change moved, the causal mask is off by one (`<` "
            "where `<=` is meant, or queries and keys counted from different "
            "starts); if all moved, there is no mask at all, or something is "
            "averaged over the whole sequence."
        )

    for start in sorted({1, length // 2, length - 1}):
        where = np.arange(length)[None] >= start
        where = np.broadcast_to(where, (subject.batch_size, length))
        changed = probe.full(replace(probe.inputs, probe.other_inputs, where))
        found = probe.compare(changed, probe.expected, ~where)
        claim = (
            f"Tokens from position {start} on were changed, and outputs at the "
            f"earlier positions {ranges(found.wrong_positions)} moved, in a call "
            "without a cache."
        )
        worst = max(worst, probe.require("causality", claim, found, advice))

    start = size // 2
    where = np.arange(size)[None] >= start
    where = np.broadcast_to(where, (subject.batch_size, size))
    head, other = part(probe.inputs, 0, size), part(probe.other_inputs, 0, size)
    outputs, _ = probe.step(head, probe.create_cache(), 0)
    changed, _ = probe.step(replace(head, other, where), probe.create_cache(), 0)
    found = probe.compare(changed, outputs, ~where)
    claim = (
        f"Tokens from position {start} on were changed, and outputs at the earlier "
        f"positions {ranges(found.wrong_positions)} moved, in a prefill with a "
        "cache."
    )
    return max(worst, probe.require("causality", claim, found, advice))


def check_rows(subject: Subject, probe: Probe) -> float:
    """Rows don't affect each other, and reordering a cache reorders the outputs."""
    rows, length, size = subject.batch_size, subject.length, subject.prefill_size
    first = np.arange(rows) == 0
    where = np.broadcast_to(first[:, None], (rows, length))
    mixed = replace(probe.inputs, probe.other_inputs, where)

    def advice(found: Difference) -> str:
        return (
            f"Rows that moved: {ranges(found.wrong_rows)}. Look for a "
            "reshape or transpose in which the batch axis does not stay the first, "
            "for a mean or a norm over the batch, or for one row's "
            "`cache_update_index` used for all."
        )

    claim = "Row 0 was changed, and outputs of other rows moved, in {}."
    found = probe.compare(probe.full(mixed), probe.expected, ~where)
    calls = [(found, "a call without a cache")]
    outputs, cache = _prefill(probe, probe.inputs, size)
    changed, changed_cache = _prefill(probe, mixed, size)
    found = probe.compare(changed, outputs, ~where[:, :size])
    calls.append((found, "a prefill with a cache"))
    # Each row has an index of its own, although they are all the same.
    index = as_index(ROWS, size, rows)
    token = part(probe.inputs, size, 1)
    stepped, _ = probe.step(token, cache, index)
    changed, _ = probe.step(part(mixed, size, 1), changed_cache, index)
    found = probe.compare(changed, stepped, ~where[:, :1], size)
    calls.append((found, "a call on one token with a cache"))
    worst = max(
        probe.require("rows", claim.format(what), found, advice)
        for found, what in calls
    )

    order = np.roll(np.arange(rows), 1)
    reordered = tree.map_structure(lambda x: ops.take(x, order, axis=0), cache)
    token = tree.map_structure(lambda x: x[order], token)
    outputs, _ = probe.step(token, reordered, index)
    found = probe.compare(outputs, [x[order] for x in stepped], positions=size)
    claim = (
        f"The rows of the cache and of the next token were reordered as {order}, "
        "but the outputs are not the earlier ones in this order."
    )
    advice_text = (
        "Everything that belongs to a row must be in the cache, along the first "
        "axis of its tensors. Beam search relies on it."
    )
    return max(worst, probe.require("rows", claim, found, advice_text))


def _prefill(probe: Probe, inputs: Any, size: int) -> tuple[list[np.ndarray], Any]:
    return probe.step(part(inputs, 0, size), probe.create_cache(), 0)


def leaf_name(path: tuple) -> str:
    """Where in a cache a tensor is."""
    if not path:
        return "the cache"
    return "cache" + "".join(f"[{key!r}]" for key in path)
