"""The weights that a model computes with: with updates of LoRA, and not quantized."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from attention.contract import Tensor, all_layers

# What quantized layers store besides.
_QUANTIZED = ("_scale", "_zero", "g_idx")


def current_weights(backbone: Any) -> dict[str, Any]:
    """Returns the plain weights of a backbone by path: variables, or tensors.

    Those that LoRA updates have their update added, and those of quantized layers are
    floats.
    """
    values = {weight.path: weight for weight in backbone.weights}
    for layer in all_layers(backbone):
        updated = getattr(layer, "lora_enabled", False)
        quantized = getattr(layer, "quantization_mode", None)
        if not updated and not quantized:
            continue
        for weight in layer.weights:
            if weight.name.startswith("lora_") or weight.name.endswith(_QUANTIZED):
                del values[weight.path]
        paths = {weight.name: weight.path for weight in layer.weights}
        computed = dequantized(layer) if quantized else _updated(layer)
        for name, value in computed.items():
            # A mixed policy computes in another dtype.
            values[paths[name]] = ops.cast(value, layer.variable_dtype)
    return values


def _updated(layer: Any) -> dict[str, Tensor]:
    is_embedding = isinstance(layer, keras.layers.Embedding)
    name = "embeddings" if is_embedding else "kernel"
    return {name: getattr(layer, name)}


def dequantized(layer: Any) -> dict[str, Tensor]:
    """Returns what a quantized layer computes with, found by what it returns.

    How it stores its weights is its own affair. Rows of an identity matrix are not
    rounded where the inputs are quantized, too.
    """
    if isinstance(layer, keras.layers.Embedding):
        found = {"embeddings": layer(ops.arange(layer.input_dim))}
        if any(w.name == "reverse_embeddings" for w in layer.weights):
            eye = ops.eye(layer.output_dim, dtype=layer.compute_dtype)
            found["reverse_embeddings"] = layer(eye[None], reverse=True)[0]
        return found
    if layer.activation is not keras.activations.linear:
        raise ValueError(
            f"The quantized weights of layer '{layer.name}' can't be read, as it has an "
            "activation. Put the activation into a layer of its own, or call this "
            "before `quantize`."
        )
    if isinstance(layer, keras.layers.EinsumDense):
        given, result = layer.equation.split("->")
        inputs, kernel = given.split(",")
        contracted = [x for x in inputs if x in kernel]
        order = [*contracted, *(x for x in result if x in kernel)]
        shape = getattr(layer, "original_kernel_shape", None) or layer.kernel.shape
        sizes = dict(zip(kernel, shape))
        axes = tuple(sizes[x] for x in contracted)
    else:
        order, kernel = [*"io"], "io"
        axes = (layer.input_spec.axes[-1],)
        sizes = {"i": axes[0], "o": layer.units}
    eye = ops.eye(math.prod(axes), dtype=layer.compute_dtype)
    eye = ops.reshape(eye, (1, -1, *axes))
    outputs = layer(eye) - layer(ops.zeros_like(eye))  # Without the bias.
    outputs = ops.reshape(outputs, [sizes[x] for x in order])
    return {"kernel": ops.transpose(outputs, [order.index(x) for x in kernel])}
