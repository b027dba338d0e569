"""Whether a model's weights have changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

_NEIGHBOURS = 256


def weights_signature(functions: Any, task: Any) -> tuple:
    """A value that changes with the weights of a model.

    It costs one reading of the weights, as much as a decode step.

    Args:
        functions: a `CompiledFunctions` of the task.
        task: the model.

    Returns:
        What is equal for equal weights.
    """
    variables = list(task.weights)
    compute = functions.get("weights signature", lambda: _make(variables), fixed=True)
    sums = tuple(int(ops.convert_to_numpy(x)) % 2**32 for x in compute())
    layout = tuple((v.path, tuple(v.shape), str(v.dtype)) for v in variables)
    return layout, sums


def _make(variables: list[Any]) -> Callable:
    def compute() -> list[Any]:
        return [_weighted_sum(v) for v in variables]

    return compute


def _weighted_sum(variable: Any) -> Any:
    """A sum in which each place counts differently, modulo 2**32.

    Sums of floats lose small weights beside large ones, and all beside an infinite one,
    but sums of integers are slow on CPUs. So in matrices few neighbours are added as
    floats, and the bits of these sums as integers.
    """
    is_matrix = len(variable.shape) > 1
    x = ops.reshape(ops.convert_to_tensor(variable), (-1,))
    columns = math.gcd(x.shape[0], _NEIGHBOURS) if is_matrix else 1
    if columns > 1 and "float" in keras.backend.standardize_dtype(x.dtype):
        x = ops.reshape(ops.cast(x, "float32"), (-1, columns))
        x = ops.matmul(x, ops.convert_to_tensor(_float_factors(columns))[:, None])[:, 0]
    return ops.sum(_bits(x) * ops.convert_to_tensor(_odd_factors(x.shape[0])))


def _bits(x: Any) -> Any:
    """The bits of a tensor as `int32`."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype == "bool":
        return ops.cast(x, "int32")
    size = np.dtype("uint8" if dtype.startswith("float8") else dtype).itemsize
    return ops.cast(ops.view(x, {1: "int8", 2: "int16"}.get(size, "int32")), "int32")


@functools.lru_cache(maxsize=64)
def _float_factors(size: int) -> np.ndarray:
    return np.random.default_rng(size).uniform(0.5, 1.5, size).astype("float32")


@functools.lru_cache(maxsize=64)
def _odd_factors(size: int) -> np.ndarray:
    # By odd ones no change of a single number is lost.
    factors = np.random.default_rng(size).integers(-(2**30), 2**30, size)
    return (2 * factors + 1).astype("int32")
