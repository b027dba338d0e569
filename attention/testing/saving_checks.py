"""Checks that a layer comes back from its configuration and from a file."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import keras

from attention.contract.inner_layers import all_layers
from attention.testing.backends import without_gradients
from attention.testing.probe import Difference, Probe
from attention.testing.sequences import part, positional, tensors
from attention.testing.subjects import copy_weights


def check_config(probe: Probe) -> None:
    """`get_config` holds all that was set."""
    made, subject = probe.made, probe.subject
    with _custom_objects(made):
        subject.doing = "asked for its `get_config`"
        config = made.get_config()
        _require_all_arguments(probe, config)
        subject.doing = "saved as JSON: `keras.saving.serialize_keras_object`"
        saved = json.dumps(keras.saving.serialize_keras_object(made))
        subject.doing = "made from its own configuration"
        again = keras.saving.deserialize_keras_object(json.loads(saved))
    subject.build(again)
    # A functional model made again has other names of operations and another order of
    # layers; its weights are compared after loading, by the next check.
    is_model = isinstance(made, keras.Model)
    shapes = [[tuple(v.shape) for v in x.weights] for x in (made, again)]
    wrong = ""
    if type(again) is not type(made):
        # Two classes may be registered under one name.
        wrong = f"another class, {type(again).__module__}.{type(again).__name__}"
    elif not is_model and again.get_config() != config:
        new = again.get_config()
        key = next(k for k in {**config, **new} if config.get(k) != new.get(k))
        wrong = (
            f"another configuration: `{key}` was {config.get(key)!r:.80} and is "
            f"{new.get(key)!r:.80}"
        )
    elif sorted(shapes[0]) != sorted(shapes[1]):
        wrong = f"weights of other shapes: {shapes[0]} became {shapes[1]}"
    if wrong:
        subject.fail(
            f"`from_config(get_config())` of {subject} gives an object with {wrong}. "
            "Return every argument of `__init__` from `get_config`."
        )
    if is_model:
        return
    copy_weights(made, again)
    probe.require(
        "An object made by `from_config(get_config())`, with the same weights, must "
        "give the same outputs.",
        _compare_head(probe, lambda inputs: subject.call(again, inputs, None)),
        "An argument of `__init__` is missing from `get_config`, or something is "
        "drawn at random and not kept as a weight.",
    )


def _require_all_arguments(probe: Probe, config: dict[str, Any]) -> None:
    cls = type(probe.made)
    if cls.from_config.__func__ is not keras.layers.Layer.from_config.__func__:
        return
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind not in kinds]
    missing = ", ".join(f"`{name}`" for name in names if name not in config)
    if missing:
        probe.subject.fail(
            f"`get_config` of {probe.subject} leaves out {missing}: what was set "
            "would be lost in saving and loading, silently. Add every argument of "
            "`__init__` to the dict."
        )


def check_saving(probe: Probe) -> None:
    """A `.keras` file gives the same outputs."""
    made, subject = probe.made, probe.subject
    with tempfile.TemporaryDirectory() as folder, _custom_objects(made):
        path = os.path.join(folder, "model.keras")
        subject.doing = "called on a `keras.Input`, in a functional model"
        model = subject.as_model(made)
        subject.doing = "saved to a `.keras` file"
        model.save(path)
        subject.doing = "loaded from a `.keras` file"
        loaded = keras.saving.load_model(path)
        found = _compare_head(probe, lambda x: loaded(subject.complete(x)))
    probe.require(
        "Saved to a `.keras` file and loaded, it must give the same outputs.",
        found,
        "What is learned or drawn at random must be a weight (`add_weight` in "
        "`build`, or a sublayer that is an attribute), and what is set must be in "
        "`get_config`.",
    )


def _compare_head(probe: Probe, call: Callable) -> Difference:
    """Compares the outputs of a restored object on the first tokens."""
    head = tensors(part(probe.inputs, 0, probe.size))
    outputs = positional(without_gradients(call)(head), probe.size)
    return probe.compare(outputs, part(probe.expected, 0, probe.size))


def _custom_objects(made: keras.layers.Layer) -> Any:
    """Returns a scope in which unregistered classes can be loaded.

    Whether a class is registered is the business of whoever saves a model with
    it, not of what it computes.
    """
    saving = keras.saving
    classes = {type(layer) for layer in all_layers(made)}
    names = {cls: saving.get_registered_name(cls) for cls in classes}
    unknown = [x for x in classes if saving.get_registered_object(names[x]) is None]
    return saving.custom_object_scope({cls.__name__: cls for cls in unknown})
