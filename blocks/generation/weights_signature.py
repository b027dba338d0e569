"""Whether a model's weights have changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops


def weights_signature(functions: Any, task: Any) -> tuple:
    """A value that changes with the weights of a model.

    It costs one reading of the weights, as much as a decode step.

    Args:
        functions: a `CompiledFunctions` of the task.
        task: the model.

    Returns:
        What can be compared by `same_signature`.
    """
    variables = list(task.weights)
    compute = functions.get("weights signature", lambda: _make(variables))
    sums = [ops.convert_to_numpy(x) for x in compute()]
    layout = tuple((v.path, tuple(v.shape), str(v.dtype)) for v in variables)
    return layout, np.array(sums)


def same_signature(a: tuple, b: tuple) -> bool:
    """Whether two signatures are those of the same weights."""
    return a[0] == b[0] and np.array_equal(a[1], b[1], equal_nan=True)


def _make(variables: list[Any]) -> Callable:
    def compute() -> list[Any]:
        return [_weighted_sum(v) for v in variables]

    return compute


def _weighted_sum(variable: Any) -> Any:
    """A sum in which each place counts differently."""
    x = ops.cast(ops.convert_to_tensor(variable), "float32")
    columns = variable.shape[-1] if len(variable.shape) else 1
    x = ops.reshape(x, (-1, columns))
    rows = int(np.prod(variable.shape, dtype="int64")) // max(columns, 1)
    by_row = ops.matmul(x, ops.convert_to_tensor(_factors(columns))[:, None])[:, 0]
    return ops.sum(by_row * ops.convert_to_tensor(_factors(rows)))


@functools.lru_cache(maxsize=256)
def _factors(size: int) -> np.ndarray:
    return np.random.default_rng(size).uniform(0.5, 1.5, size).astype("float32")
