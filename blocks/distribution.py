"""The layout of a model on several devices, from what its layers declare."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras

from attention.contract import Names, WeightAxes, axes_of_weights, describe


def make_layout_map(
    make_model: Callable[[], Any],
    device_mesh: keras.distribution.DeviceMesh,
    model_dim_name: str = "model",
) -> keras.distribution.LayoutMap:
    """Makes the map by which `keras.distribution.ModelParallel` divides a model.

    Weights are divided along their heads, hidden units, experts or vocabulary, as layers
    declare them (`attention.declare_role`, `attention.declare_axes`). What can't be
    divided evenly is whole on each device, and a warning says so.

    Keras lays weights out when they are made: set the distribution, then make the model.
    Here it is made without weights, so it may be larger than the memory of a device.

    Args:
        make_model: function without arguments that returns the model. Layers need
            names: weights are found by their paths.
        device_mesh: a `keras.distribution.DeviceMesh`.
        model_dim_name: str. The axis of the mesh along which weights are divided.

    Returns:
        A `keras.distribution.LayoutMap`: a layout for each weight that is divided.

    Raises:
        TypeError: if `make_model` is no function.
        ValueError: if the mesh has no such axis, a weight of two axes or more is not
            declared, or a path is another one each time.

    Example:

    >>> import keras
    >>> from blocks import CausalLM, CustomBackbone, make_layout_map
    >>> def make_model():
    ...     return CausalLM(CustomBackbone(50, 2, 2, 16, 32))
    >>> mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    >>> layout_map = make_layout_map(make_model, mesh)
    >>> layout_map["transformer_layer_0/ffn/intermediate/kernel"].axes
    (None, 'model')
    """
    if not callable(make_model) or isinstance(make_model, keras.layers.Layer):
        raise TypeError(
            "`make_model` must be a function without arguments that makes the model: it "
            "is made here to see its weights, and by you once the distribution is set. "
            f"Received: make_model={describe(make_model)}"
        )
    if model_dim_name not in device_mesh.axis_names:
        raise ValueError(
            f"`device_mesh` has no axis '{model_dim_name}'. Received: axis_names="
            f"{tuple(device_mesh.axis_names)}. Pass one of these as `model_dim_name`."
        )
    axes = _axes_of_model(make_model)
    parts = dict(zip(device_mesh.axis_names, device_mesh.shape))[model_dim_name]
    layout_map = keras.distribution.LayoutMap(device_mesh)
    whole: dict[tuple, list[str]] = {}
    for path, weight in axes.items():
        divided = [i for i, name in enumerate(weight.names) if name is not None]
        even = [i for i in divided if weight.counts[i] % parts == 0]
        if even:
            layout: Names = tuple(
                model_dim_name if i == even[0] else None
                for i in range(len(weight.names))
            )
            layout_map[re.escape(path)] = layout
        elif divided:
            reason = weight.names[divided[0]], weight.counts[divided[0]]
            whole.setdefault(reason, []).append(path)
    for (name, count), paths in whole.items():
        warnings.warn(
            f"Each device has all of a weight whose axis '{name}', of {count}, is not "
            f"divisible by {parts}, the devices along '{model_dim_name}': '{paths[0]}'"
            + (f" and {len(paths) - 1} others." if len(paths) > 1 else "."),
            stacklevel=2,
        )
    return layout_map


def _axes_of_model(make_model: Callable[[], Any]) -> dict[str, WeightAxes]:
    """Returns the axes of the weights of the model, of which nothing stays."""
    found: list[dict[str, WeightAxes]] = []

    def make() -> None:
        found.append(axes_of_weights(make_model()))

    def make_twice() -> None:
        for _ in range(2):
            if keras.backend.backend() == "jax":
                import jax

                # What is traced has shapes and no values. JAX traces a function once.
                jax.eval_shape(lambda: make())
            else:
                make()

    drawn = random.getstate()
    # Keras counts names in each thread, and has a distribution in each: those of the
    # caller stay as they are, and so do the seeds of the next initializers.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(make_twice).result()
    random.setstate(drawn)
    first, second = found
    differ = sorted(path for path in first if path not in second)
    if differ:
        raise ValueError(
            "Weights are found by their paths, and these are others each time the model "
            f"is made: {', '.join(differ)}. Name the layers in them that Keras names by "
            "a number, such as 'dense_1'."
        )
    return first
