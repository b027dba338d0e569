"""How tensors of published checkpoints and weights of layers become each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Of weights that exist, which have no unknown sizes.
Shape = tuple[int, ...]
Arrays = Iterator[np.ndarray]


class Conversion:
    """One or more tensors of a checkpoint, and the weights that they are.

    A subclass implements the three methods below. All sequences are in the order of
    the names in the table and of `paths`.

    Args:
        *paths: str. The paths of the weights; within a block, from the block on.
    """

    def __init__(self, *paths: str) -> None:
        self.paths = paths

    def tensor_shapes(self, shapes: Sequence[Shape], count: int) -> list[Shape]:
        """Returns the shapes of `count` tensors for weights of these shapes."""
        raise NotImplementedError

    def load(self, tensors: Arrays, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Returns the weights, from tensors that are read as they are asked for."""
        raise NotImplementedError

    def save(self, weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        """Returns the tensors, from the weights."""
        raise NotImplementedError


class Plain(Conversion):
    """A tensor with the weight's numbers in the same order.

    Args:
        path: str. The path of the weight.
        rank: int or `None`. The tensor's rank, if it is not the weight's: 1 flattens
            (a bias of heads); more puts axes of size 1 in front of the last.
    """

    def __init__(self, path: str, rank: int | None = None) -> None:
        super().__init__(path)
        self.rank = rank

    def tensor_shapes(self, shapes: Sequence[Shape], count: int) -> list[Shape]:
        (shape,) = shapes
        rank = len(shape) if self.rank is None else self.rank
        if rank == 1:
            return [(math.prod(shape),)]
        return [(*shape[:-1], *[1] * (rank - len(shape)), *shape[-1:])]

    def load(self, tensors: Arrays, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [next(tensors).reshape(shapes[0])]

    def save(self, weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        (shape,) = self.tensor_shapes([weights[0].shape], count)
        return [weights[0].reshape(shape)]


class Dense(Conversion):
    """A matrix `(outputs, inputs)`, as torch stores it, that is one or more kernels.

    Several kernels, or biases, lie behind one another along the axis of outputs.

    Args:
        *paths: str. The paths of kernels, or of biases.
        inputs: int. How many of a kernel's first axes are inputs.
        transposed: bool. Whether the matrix is `(inputs, outputs)`.
    """

    def __init__(self, *paths: str, inputs: int = 1, transposed: bool = False) -> None:
        super().__init__(*paths)
        self.inputs, self.transposed = inputs, transposed

    def _sizes(self, shape: Shape) -> tuple[int, ...]:
        """Returns the outputs of a weight and, of a kernel, its inputs."""
        if self._is_bias():
            return (math.prod(shape),)
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def _is_bias(self) -> bool:
        return self.paths[0].endswith("bias")

    def tensor_shapes(self, shapes: Sequence[Shape], count: int) -> list[Shape]:
        sizes = [self._sizes(shape) for shape in shapes]
        shape = (sum(size[0] for size in sizes), *sizes[0][1:])
        return [shape[::-1] if self.transposed else shape]

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Cuts outputs, the first axis, into those of each weight."""
        ends = np.cumsum([self._sizes(shape)[0] for shape in shapes])
        return np.split(tensor, ends[:-1])

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Undoes `split`."""
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def load(self, tensors: Arrays, shapes: Sequence[Shape]) -> list[np.ndarray]:
        tensor = next(tensors)
        tensor = tensor.T if self.transposed else tensor
        parts = self.split(tensor, shapes)
        return [part.T.reshape(shape) for part, shape in zip(parts, shapes)]

    def save(self, weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        parts = [x.reshape(self._sizes(x.shape)[::-1]).T for x in weights]
        tensor = self.join(parts)
        return [tensor.T if self.transposed else tensor]


class DenseByGroup(Dense):
    """Heads that lie group by group in one matrix.

    With queries, keys and values, a group is a key/value head: its query heads, its key
    and its value, as in GPT-NeoX, BLOOM and Falcon.

    Args:
        *paths: str. The paths of kernels, or of biases, with axes of heads. Those of the
            second have a head for each group.
    """

    def __init__(self, *paths: str) -> None:
        super().__init__(*paths)

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        heads = [shape[-2] for shape in shapes]
        groups, ends = heads[1], np.cumsum([count // heads[1] for count in heads])
        size = shapes[0][-1]
        x = tensor.reshape((groups, ends[-1], size, *tensor.shape[1:]))
        parts = np.split(x, ends[:-1], axis=1)
        return [part.reshape((-1, *tensor.shape[1:])) for part in parts]

    def save(self, weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        groups, size = weights[1].shape[-2:]
        parts = [x.reshape(self._sizes(x.shape)[::-1]).T for x in weights]
        rest = parts[0].shape[1:]
        parts = [x.reshape((groups, -1, size, *rest)) for x in parts]
        return [np.concatenate(parts, axis=1).reshape((-1, *rest))]


class Depthwise(Conversion):
    """The kernel of a depthwise convolution, `(channels, 1, size)` in torch.

    Args:
        path: str. The path of the weight, `(size, channels)`.
    """

    def tensor_shapes(self, shapes: Sequence[Shape], count: int) -> list[Shape]:
        size, channels = shapes[0]
        return [(channels, 1, size)]

    def load(self, tensors: Arrays, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [next(tensors)[:, 0].T]

    def save(self, weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        return [weights[0].T[:, None]]


class Convolution(Conversion):
    """The kernel of a convolution, `(outputs, inputs, size)` in torch.

    Args:
        path: str. The path of the weight, `(size, inputs, outputs)`.
    """

    def tensor_shapes(self, shapes: Sequence[Shape], count: int) -> list[Shape]:
        return [shapes[0][::-1]]

    def load(self, tensors: Arrays, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [next(tensors).T]

    def save(self, weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        return [weights[0].T]


class Stacked(Conversion):
    """A tensor for each expert, or head, in one weight `(experts, ...)`.

    Args:
        path: str. The path of the weight, whose kernels are `(inputs, outputs)`.
    """

    def tensor_shapes(self, shapes: Sequence[Shape], count: int) -> list[Shape]:
        return [tuple(shapes[0][:0:-1])] * count

    def load(self, tensors: Arrays, shapes: Sequence[Shape]) -> list[np.ndarray]:
        weight = np.empty(0)
        for i, tensor in enumerate(tensors):
            if i == 0:
                weight = np.empty(shapes[0], tensor.dtype)
            weight[i] = tensor.T
        return [weight]

    def save(self, weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        return [x.T for x in weights[0]]


class Changed(Conversion):
    """Another conversion whose tensors are changed on the way.

    Args:
        conversion: the conversion.
        load: called with a tensor; returns what `conversion` reads, of the same shape.
        save: called with what `conversion` writes; returns the tensor.
    """

    def __init__(self, conversion: Any, load: Any, save: Any) -> None:
        self.inner = to_conversion(conversion)
        super().__init__(*self.inner.paths)
        self._load, self._save = load, save

    def tensor_shapes(self, shapes: Sequence[Shape], count: int) -> list[Shape]:
        return self.inner.tensor_shapes(shapes, count)

    def load(self, tensors: Arrays, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return self.inner.load((self._load(x) for x in tensors), shapes)

    def save(self, weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
        return [self._save(x) for x in self.inner.save(weights, count)]


def rows_by_group(inner: Any, groups: int, sizes: Sequence[int]) -> Conversion:
    """Returns a conversion of rows that lie group by group in one matrix.

    Args:
        inner: a conversion of a matrix in which the parts lie behind one another.
        groups: int. The number of groups.
        sizes: ints. How many rows of a group belong to each part.
    """
    rows = np.arange(groups * sum(sizes)).reshape((groups, -1))
    parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
    order = np.concatenate([part.reshape(-1) for part in parts])
    return Changed(inner, lambda x: x[order], lambda x: x[np.argsort(order)])


def rows_in_pairs(inner: Any, plain: int, rotary: int, rest: int = 0) -> Conversion:
    """Returns a conversion of rows that are rotated in pairs of neighbours in files.

    Here pairs are as far apart as half of what is rotated (`attention.RotaryPosition`).

    Args:
        inner: a conversion of a matrix, or bias, in which they lie as here.
        plain: int. How many rows of each head, the first ones, are not rotated.
        rotary: int. How many are.
        rest: int. How many after these are not.
    """

    def swapped(x: np.ndarray, pairs: tuple[int, int]) -> np.ndarray:
        """Swaps two axes, of these sizes, of the rotated rows of each head."""
        heads = x.reshape((-1, plain + rotary + rest, *x.shape[1:]))
        first, rotated, last = np.split(heads, [plain, plain + rotary], axis=1)
        shape = rotated.shape
        rotated = rotated.reshape((len(heads), *pairs, *x.shape[1:]))
        rotated = rotated.swapaxes(1, 2).reshape(shape)
        return np.concatenate([first, rotated, last], axis=1).reshape(x.shape)

    half = rotary // 2
    return Changed(
        inner, lambda x: swapped(x, (half, 2)), lambda x: swapped(x, (2, half))
    )


def attention_paths(weight: str, *names: str) -> list[str]:
    """Returns the paths of the same weight of several parts of a block's attention.

    Args:
        weight: str. Its name, such as `"kernel"`.
        *names: str. The parts; by default the projections of queries, keys and values.
    """
    names = names or ("query", "key", "value")
    return [f"self_attention/{name}/{weight}" for name in names]


def layer_lines(names: dict[str, str]) -> dict[str, str]:
    """Returns the lines of a table for the weight and the bias of layers.

    Args:
        names: dict from layers in files to paths. One that ends with `norm` is a layer
            norm; others are dense layers.
    """
    found = {}
    for name, path in names.items():
        norm = path.endswith("norm")
        found[f"{name}.weight"] = f"{path}/{'gamma' if norm else 'kernel'}"
        found[f"{name}.bias"] = f"{path}/{'beta' if norm else 'bias'}"
    return found


def attention_lines(
    name: str,
    path: str,
    parts: Sequence[str] = ("q_proj", "k_proj", "v_proj", "out_proj"),
) -> dict[str, str]:
    """Returns the lines of a table for the projections of an attention layer.

    Args:
        name: str. What names in files begin with.
        path: str. The path of the layer within a block.
        parts: sequence of str. What files call the projections of queries, keys, values
            and outputs.
    """
    ours = ("query", "key", "value", "attention_output")
    return layer_lines({f"{name}.{x}": f"{path}/{y}" for x, y in zip(parts, ours)})


def to_conversion(value: str | Conversion) -> Conversion:
    """Returns the conversion of a table's entry.

    A path alone means what its last part says: a kernel is a matrix `(outputs, inputs)`
    there, embeddings are as they are, and all else is one-dimensional.
    """
    if isinstance(value, Conversion):
        return value
    if value.endswith("attention_output/kernel"):
        return Dense(value, inputs=2)
    if value.endswith(("/kernel", "reverse_embeddings")):
        return Dense(value)
    return Plain(value, rank=None if value.endswith("embeddings") else 1)
