"""What the axes of weights are: models are divided among devices, and trained, by them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from attention.contract.inner_layers import all_layers
from attention.contract.roles import (
    FEED_FORWARD_ROLES,
    Names,
    declared_axes,
    declared_heads,
    role_of,
)
from attention.contract.types import Shape

# These projections have their heads or hidden units as inputs, others as outputs.
_OUTPUT_ROLES = ("output", "ffn_output")
_PROJECTIONS = (keras.layers.Dense, keras.layers.EinsumDense)


class WeightAxes(NamedTuple):
    """The axes of a weight.

    Attributes:
        names: tuple. For each axis the name of `declare_axes`, or `None`: it is never divided.
        counts: tuple of ints. For each axis how many parts of it belong together as
            one: the heads of an axis that holds the channels of all heads, say.
        shape: tuple of ints. The shape of the weight.
        matrix: str or `None`. For a weight by which vectors are multiplied a letter for
            each axis: `"i"` one of the inputs, `"o"` one of the outputs, `"b"` one along
            which there is a matrix for each entry. A kernel `(width, heads, dim)` is the
            matrix `"ioo"`, of `width` rows and `heads * dim` columns.
    """

    names: Names
    counts: Shape
    shape: Shape
    matrix: str | None


def axes_of_weights(model: Any, trainable: bool = False) -> dict[str, WeightAxes]:
    """Returns the axes of all weights of a layer or model, by path.

    Args:
        model: a layer or model.
        trainable: bool. Whether to leave out weights that are not trained.

    Raises:
        ValueError: if a weight of two axes or more has none. All are named.
    """
    found, unknown = known_axes(model, trainable)
    if unknown:
        raise ValueError(
            "Nobody says what the axes of these weights are:\n- "
            + "\n- ".join(unknown)
            + "\nIn the layer that makes them, declare the role of a projection, "
            "`attention.declare_role(self.wq, 'query')`, or the axes of a weight, "
            "`attention.declare_axes(self, {'kernels': ('experts', None, None)})`, with "
            "`(None, 'vocabulary')` for the kernel of a head, and None for axes along "
            "which nothing is to be divided."
        )
    return found


def known_axes(
    model: Any, trainable: bool = False
) -> tuple[dict[str, WeightAxes], list[str]]:
    """Returns the axes of weights by path, and what has none and two axes or more.

    Its arguments are those of `axes_of_weights`.
    """
    found: dict[str, WeightAxes] = {}
    unknown: dict[str, str] = {}
    for layer in all_layers(model):
        known = _axes_by_name(layer)
        matrices = _matrices_by_name(layer)
        for weight in _own_weights(layer):
            if trainable and not weight.trainable:
                continue
            shape = tuple(weight.shape)
            names = known.get(weight.name)
            if names is None and len(shape) > 1:
                unknown[weight.path] = (
                    f"{weight.path} {shape} of {type(layer).__name__} '{layer.name}'"
                )
                continue
            names = names or (None,) * len(shape)
            if len(names) != len(shape):
                raise ValueError(
                    f"Weight '{weight.path}' of shape {shape} was declared with "
                    f"{len(names)} axes: {names}. Name each axis in `declare_axes`."
                )
            # Another layer may hold the weight, too.
            if weight.path not in found or any(names):
                heads = declared_heads(layer)
                counts = (
                    heads if heads and name == "heads" else size
                    for name, size in zip(names, shape)
                )
                matrix = matrices.get(weight.name)
                found[weight.path] = WeightAxes(names, tuple(counts), shape, matrix)
    return found, [text for path, text in unknown.items() if path not in found]


def _own_weights(layer: Any) -> Iterator[keras.Variable]:
    """Yields the weights of a layer without those of the layers in it."""
    seen: set[int] = set()
    waiting: list[Any] = list(vars(layer).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, keras.Variable):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)


def _axes_by_name(layer: Any) -> dict[str, Names]:
    found: dict[str, Names] = {}
    role = role_of(layer)
    if isinstance(layer, keras.layers.Embedding):
        found["embeddings"] = ("vocabulary", None)
        found["reverse_embeddings"] = (None, "vocabulary")
    elif role is not None:
        found.update(_axes_of_projection(layer, role))
    found.update(declared_axes(layer))
    # Low-rank updates: the weight's first axes and its last one, and the rank.
    for name in ("kernel", "embeddings"):
        if name in found:
            found[f"lora_{name}_a"] = (*found[name][:-1], None)
            found[f"lora_{name}_b"] = (None, found[name][-1])
    return found


def _axes_of_projection(layer: Any, role: str) -> dict[str, Names]:
    axis = "hidden" if role in FEED_FORWARD_ROLES else "heads"
    inputs, kernel, outputs = _letters(layer)
    shared = outputs if role in _OUTPUT_ROLES else inputs
    divided = next(x for x in kernel if x not in shared)
    found = {"kernel": kernel}
    bias = getattr(layer, "bias", None)
    if bias is not None:
        found["bias"] = outputs[-len(bias.shape) :]
    return {
        name: tuple(axis if x == divided else None for x in letters)
        for name, letters in found.items()
    }


def _letters(layer: Any) -> list[str]:
    """Returns the letters of a projection's inputs, kernel and outputs."""
    equation = getattr(layer, "equation", "i,io->o")
    return re.split(",|->", equation.replace("...", ""))


def _matrices_by_name(layer: Any) -> dict[str, str]:
    declared = declared_axes(layer)
    # Kernels of experts or heads that lie one after the other.
    found = {
        name: "bio"
        for name, axes in declared.items()
        if len(axes) == 3 and axes[0] in ("experts", "heads")
    }
    is_head = "vocabulary" in declared.get("kernel", ())
    if isinstance(layer, _PROJECTIONS) and not is_head:
        inputs, kernel, outputs = _letters(layer)
        matrix = "".join(
            "o" if x not in inputs else "b" if x in outputs else "i" for x in kernel
        )
        found["kernel"] = matrix
        found["lora_kernel_a"], found["lora_kernel_b"] = f"{matrix[:-1]}o", "io"
    return found
