"""Checks that a layer comes back from its configuration and from a file."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from typing import Any

import keras

from attention.contract.inner_layers import all_layers
from attention.testing.comparing import Difference
from attention.testing.failure import ConformanceError
from attention.testing.probe import Probe, part
from attention.testing.subjects import Subject, copy_weights


def check_config(subject: Subject, probe: Probe) -> float:
    """`get_config` holds all that was set."""
    made = probe.made
    with _custom_objects(made):
        probe.doing = "asked for its `get_config`"
        config = made.get_config()
        _require_all_arguments(probe, config)
        probe.doing = "saved as JSON: `keras.saving.serialize_keras_object`"
        saved = json.dumps(keras.saving.serialize_keras_object(made))
        probe.doing = "made from its own configuration"
        again = keras.saving.deserialize_keras_object(json.loads(saved))
    subject.build(again)
    # A functional model names the operations between its layers, and orders the
    # layers, anew; its weights are compared after loading, by the next check.
    is_model = isinstance(made, keras.Model)
    same_kind = type(again) is type(made)
    same_kind = same_kind and (is_model or again.get_config() == config)
    shapes = [[tuple(v.shape) for v in x.weights] for x in (made, again)]
    if is_model:
        shapes = [sorted(x) for x in shapes]
    if not same_kind or shapes[0] != shapes[1]:
        what = "weights of other shapes" if same_kind else "another configuration"
        if type(again) is not type(made):
            # Two classes may be registered under one name.
            what = f"another class, {type(again).__module__}.{type(again).__name__},"
        raise ConformanceError(
            "config",
            f"`from_config(get_config())` of {probe} gives an object with {what}: "
            f"{_first_difference(config, again.get_config(), shapes)}. Return every "
            "argument of `__init__` from `get_config`.",
        )
    if is_model:
        return 0.0
    copy_weights(made, again)
    found = _compare_head(probe, subject, again)
    claim = (
        "An object made by `from_config(get_config())`, with the same weights, must "
        "give the same outputs."
    )
    advice = (
        "An argument of `__init__` is missing from `get_config`, or something is "
        "drawn at random and not kept as a weight."
    )
    return probe.require("config", claim, found, advice)


def _require_all_arguments(probe: Probe, config: dict[str, Any]) -> None:
    cls = type(probe.made)
    own_from_config = (
        cls.from_config.__func__ is not keras.layers.Layer.from_config.__func__
    )
    if own_from_config:
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    missing = [
        p.name for p in parameters if p.kind not in kinds and p.name not in config
    ]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        raise ConformanceError(
            "config",
            f"`get_config` of {probe} leaves out {names}: what was set would be lost "
            "in saving and loading, silently. Add every argument of `__init__` to "
            "the dict.",
        )


def _first_difference(config: dict, again: dict, shapes: list) -> str:
    for key in sorted({*config, *again}, key=str):
        if config.get(key) != again.get(key):
            return f"`{key}` was {config.get(key)!r:.80} and is {again.get(key)!r:.80}"
    return f"the weights' shapes were {shapes[0]} and are {shapes[1]}"


def check_saving(subject: Subject, probe: Probe) -> float:
    """A `.keras` file gives the same outputs."""
    made = probe.made
    with tempfile.TemporaryDirectory() as folder, _custom_objects(made):
        path = os.path.join(folder, "model.keras")
        probe.doing = "called on a `keras.Input`, in a functional model"
        model = subject.as_model(made)
        probe.doing = "saved to a `.keras` file"
        model.save(path)
        probe.doing = "loaded from a `.keras` file"
        loaded = keras.saving.load_model(path)
        found = _compare_head(probe, _Plain(subject), loaded)
    claim = "Saved to a `.keras` file and loaded, it must give the same outputs."
    advice = (
        "What is learned or drawn at random must be a weight (`add_weight` in "
        "`build`, or a sublayer that is an attribute), and what is set must be in "
        "`get_config`."
    )
    return probe.require("saving", claim, found, advice)


def _compare_head(probe: Probe, subject: Subject, restored: Any) -> Difference:
    """Compares what a restored object makes of the first tokens."""
    size = subject.prefill_size
    head = part(probe.inputs, 0, size)
    outputs = Probe(subject, restored, compiled=False).full(head)
    return probe.compare(outputs, [x[:, :size] for x in probe.expected])


class _Plain(Subject):
    """Calls a loaded model."""

    def __init__(self, subject: Subject) -> None:
        self.batch_size, self.length = subject.batch_size, subject.length
        self.prefill_size, self.doing = subject.prefill_size, subject.doing
        self.tolerance = subject.tolerance

    def call(self, made: Any, inputs: Any, mask: Any, **masks: Any) -> Any:
        return made(inputs)


def _custom_objects(made: Any) -> Any:
    """A scope in which unregistered classes can be loaded.

    Whether a class is registered is the business of whoever saves a model with
    it, not of what it computes.
    """
    classes = {type(layer) for layer in all_layers(made)}
    return keras.saving.custom_object_scope(
        {
            cls.__name__: cls
            for cls in classes
            if keras.saving.get_registered_object(keras.saving.get_registered_name(cls))
            is None
        }
    )
