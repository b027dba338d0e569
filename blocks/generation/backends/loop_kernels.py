"""Kernels in the form that a compiled loop on TensorFlow reads fastest."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops


class LoopKernels:
    """Reshapes a model's kernels of several axes to matrices before a loop.

    A kernel such as `(width, heads, dim)` is reshaped to a matrix where it is used. If
    that happens within a loop, XLA on TensorFlow fuses it with the product of a single
    token and emits a plain loop over the kernel's columns, which reads memory at a
    quarter of its speed. If it is reshaped before the loop, which copies nothing, XLA
    calls its matrix routine. On other backends it does nothing.
    """

    def __init__(self, layers: list[keras.layers.Layer]) -> None:
        self._kernels: dict[int, tuple[keras.Variable, tuple[int, int]]] = {}
        if keras.config.backend() != "tensorflow":
            return
        for layer in layers:
            if not isinstance(layer, keras.layers.EinsumDense) or not layer.built:
                continue
            kernel = layer.kernel
            # With LoRA it is a sum, not a variable.
            if isinstance(kernel, keras.Variable) and len(kernel.shape) > 2:
                shape = _matrix_shape(layer.equation, tuple(kernel.shape))
                self._kernels[id(kernel)] = kernel, shape
        self._others = {
            id(variable): variable
            for layer in layers
            for variable in layer.non_trainable_variables
            if id(variable) not in self._kernels
        }.values()

    def before_loop(self) -> list[Any]:
        """Returns the matrices. It is called outside of the loop."""
        return [ops.reshape(x.value, shape) for x, shape in self._kernels.values()]

    @contextlib.contextmanager
    def within_loop(self, matrices: list[Any]) -> Iterator[None]:
        """Opens a scope, within the loop, in which layers use these matrices."""
        if not matrices:
            yield
            return
        pairs = zip(self._kernels.values(), matrices)
        mapping = [(x, ops.reshape(matrix, x.shape)) for (x, _), matrix in pairs]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            yield
        # A layer may count or draw seeds, which the scope kept from its variables.
        for variable in self._others:
            value = scope.get_current_value(variable)
            if value is not None:
                variable.assign(value)


def _matrix_shape(equation: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns a kernel's shape `(inputs, outputs)`; axes of inputs come first."""
    letters, outputs = equation.replace(" ", "").split(",")[1].split("->")
    summed = [letter not in outputs for letter in letters]
    split = summed.index(False) if False in summed else len(summed)
    return math.prod(shape[:split]), math.prod(shape[split:])
