"""Parts of sequences: pytrees of arrays of shape `(batch, length, ...)`."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops, tree

from attention.contract.arguments import describe
from attention.testing.backends import to_numpy


def part(inputs: Any, start: int, size: int) -> Any:
    """Returns some positions of all rows."""
    return tree.map_structure(lambda x: x[:, start : start + size], inputs)


def join(*parts: Any) -> Any:
    """Returns parts of a sequence, one after the other."""
    return tree.map_structure(lambda *x: np.concatenate(x, axis=1), *parts)


def gather(inputs: Any, positions: np.ndarray) -> Any:
    """Returns the positions `(batch, n)` of each row."""
    return tree.map_structure(
        lambda x: x[np.arange(len(x))[:, None], positions], inputs
    )


def replace(inputs: Any, other: Any, where: np.ndarray) -> Any:
    """Returns the inputs, and those of another where `(batch, length)` is true."""

    def pick(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(where.reshape(where.shape + (1,) * (x.ndim - 2)), y, x)

    return tree.map_structure(pick, inputs, other)


def positional(outputs: Any, length: int) -> list[np.ndarray]:
    """Returns the outputs that belong to positions: arrays `(batch, length, ...)`."""
    return [to_numpy(x) for x in positional_tensors(outputs, length)]


def positional_tensors(outputs: Any, length: int) -> list[Any]:
    leaves = [x for x in tree.flatten(outputs) if hasattr(x, "shape")]
    found = [x for x in leaves if len(x.shape) >= 2 and x.shape[1] == length]
    if not found:
        raise ValueError(
            f"For inputs of {length} tokens, an output must be of shape (batch, "
            f"{length}, ...). Received: {describe(outputs)}"
        )
    return found


def tensors(x: Any) -> Any:
    return None if x is None else tree.map_structure(ops.convert_to_tensor, x)
