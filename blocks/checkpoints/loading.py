"""Making a model whose weights are read from a checkpoint, and never drawn."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from attention.contract import DType, Tensor
from blocks.checkpoints.architecture import Architecture, Entry
from blocks.checkpoints.conversions import Shape
from blocks.checkpoints.tensor_files import DTYPE_NAMES, Checkpoint

# One model at a time is made with weights to come.
_lock = threading.RLock()
# A progress bar is shown for loads that take longer than these seconds.
_PATIENCE = 3.0
# So many threads read tensors, and so many weights are read ahead. More than these
# wait for memory, and would hold more of it where a weight's home is another device.
_READERS = 2

Value = Callable[[Any], Any]


class _Load:
    """What the initializers of a model that is loaded share.

    Attributes:
        value_of: returns the value of a weight; `None` while the model is made.
        error: what ended the load, or `None`.
    """

    def __init__(self) -> None:
        self.value_of: Value | None = None
        self.error: BaseException | None = None


class _Later:
    """An initializer that stands for a value to come; placeholders are zeros."""

    def __init__(self, given: Any, load: _Load) -> None:
        self.given, self.load = given, load
        self.variable: Any = None

    def __call__(self, shape: Shape, dtype: DType = None) -> Tensor:
        if self.load.error is None and self.load.value_of is not None:
            # Keras would keep the weights that come after an error, of this model, and
            # fail to make the next.
            try:
                return self._value(self.load.value_of, shape, dtype)
            except BaseException as error:
                self.load.error = error
        if self.load.error is not None and keras.distribution.distribution() is None:
            # Of a model that nobody gets.
            shape = ()
        return ops.zeros(shape, dtype)

    def _value(self, value_of: Value, shape: Shape, dtype: DType) -> Tensor:
        value = value_of(self.variable)
        if value is not None:
            return value
        given = self.given
        if given is None:
            given = "glorot_uniform" if "float" in str(dtype) else "zeros"
        return keras.initializers.get(given)(shape, dtype=dtype)


@contextlib.contextmanager
def weights_from(make_values: Callable[[list[Any]], Value]) -> Iterator[None]:
    """Makes the weights of models made within it when it ends, from given values.

    Keras draws random weights at once. Within this context a weight has only a path, a
    shape and a dtype. Other threads notice nothing; a second load waits for this one.

    Args:
        make_values: called at the end with the weights, of which only these are known;
            returns a function from a weight to its value, which is asked for in their
            order; `None` means its own initializer. If it raises an error, no value is
            read.
    """
    layer, owner = keras.layers.Layer, threading.get_ident()
    load = _Load()
    made: list[Any] = []

    with _lock:
        add_weight = layer.add_weight

        def add_later(self: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner:
                return add_weight(self, *args, **kwargs)
            # Positional: shape, initializer, dtype.
            given = args[1] if len(args) > 1 else kwargs.get("initializer")
            later = _Later(given, load)
            if len(args) > 1:
                args = (args[0], later, *args[2:])
            else:
                kwargs["initializer"] = later
            later.variable = add_weight(self, *args, **kwargs)
            made.append(later.variable)
            return later.variable

        with keras.StatelessScope():
            layer.add_weight = add_later
            try:
                try:
                    yield
                finally:
                    layer.add_weight = add_weight
                load.value_of = make_values(made)
            except BaseException as error:
                load.error = error
        if load.error is not None:
            raise load.error


def load_weights(
    make: Callable[[], Any], architecture: Architecture, checkpoint: Checkpoint
) -> Any:
    """Returns the backbone or task that `make` makes, with a checkpoint's weights.

    A tensor at a time is read, and becomes a weight in its dtype and, where a
    distribution is set, in its layout. Weights of a task's head that the checkpoint
    lacks, or has of another shape, are drawn, with a warning.

    Raises:
        ValueError: if tensors are missing, surplus or have another shape. It names them
            all, and nothing was read.
    """
    found: list[Any] = []

    def make_values(weights: list[Any]) -> Value:
        model = found[0]
        shapes = checkpoint.shapes()
        entries = list(architecture.entries(model))
        names = _present_names(architecture, entries, shapes)
        entries = [
            x for x in entries if not _is_left_out(architecture, x, names, shapes)
        ]
        drawn = _drawn_entries(model, entries, names, shapes)
        entries = [entry for entry in entries if entry not in drawn]
        new = {path for entry in drawn for path in entry.paths}
        _check_tensors(architecture, model, entries, names, shapes, new)
        if new:
            warnings.warn(
                "The checkpoint has no fitting weights of the task's head: "
                f"{sorted(new)} are drawn, to be trained.",
                stacklevel=2,
            )
        return _Values(entries, names, checkpoint, weights, readers)

    with ThreadPoolExecutor(_READERS) as readers, weights_from(make_values):
        found.append(make())
    return found[0]


class _Values:
    """Returns the value of a weight, while threads read those that come next.

    What takes time is memory that is touched for the first time, and casting: both leave
    Python free. Weights of the same tensor are read together.
    """

    def __init__(
        self,
        entries: list[Entry],
        names: dict[str, str],
        checkpoint: Checkpoint,
        weights: list[Any],
        readers: Executor,
    ) -> None:
        self.names, self.checkpoint, self.readers = names, checkpoint, readers
        self.entry_of = {path: entry for entry in entries for path in entry.paths}
        self.weights = {weight.path: weight for weight in weights}
        place = {path: index for index, path in enumerate(self.weights)}
        self.unread = deque(
            sorted(entries, key=lambda entry: min(place[path] for path in entry.paths))
        )
        self.reading: dict[str, Future[dict[str, np.ndarray]]] = {}
        self.progress = _Progress(sum(math.prod(x.shape) for x in weights))

    def __call__(self, variable: Any) -> Tensor | None:
        path = variable.path
        if path not in self.entry_of:
            return None
        while self.unread and (
            path not in self.reading or len(self.reading) <= _READERS
        ):
            entry = self.unread.popleft()
            future = self.readers.submit(self._read, entry)
            self.reading.update(dict.fromkeys(entry.paths, future))
        array = self.reading.pop(path).result().pop(path)
        self.progress.add(array.size)
        # By now nothing holds what was read, so there are at most two copies.
        return to_tensor(array, variable.dtype)

    def _read(self, entry: Entry) -> dict[str, np.ndarray]:
        tensors = (self.checkpoint.read(self.names[name]) for name in entry.names)
        weights = [self.weights[path] for path in entry.paths]
        shapes = [tuple(weight.shape) for weight in weights]
        arrays = entry.conversion.load(tensors, shapes)
        return {x.path: in_order(y, x.dtype) for x, y in zip(weights, arrays)}


def in_order(value: np.ndarray, dtype: str) -> np.ndarray:
    """Copies an array, which may be a view such as a transposed matrix, to a dtype."""
    source = np.atleast_1d(value)
    target = _aligned(source.shape, np.dtype(DTYPE_NAMES.get(dtype, value.dtype)))
    # A few rows at a time, in the order of memory: numpy casts and transposes slowly at
    # once, and whole copies in between would count as memory.
    order = np.argsort([-stride for stride in source.strides], kind="stable")
    source, view = source.transpose(order), target.transpose(order)
    count = max(1, _CAST_AT_ONCE * len(source) // max(source.size, 1))
    for start in range(0, len(source), count):
        rows = slice(start, start + count)
        view[rows] = source[rows].astype(target.dtype)
    return target.reshape(value.shape)


# How many numbers.
_CAST_AT_ONCE = 1 << 18


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Returns an array in memory that a tensor can share: a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, "uint8")
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """Returns an array that `in_order` made as a tensor, which may share its memory."""
    # Keras copies an array on these two, and TensorFlow twice. Their own functions do
    # not, and don't know the bfloat16 of numpy.
    plain = array.dtype != ml_dtypes.bfloat16
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        numbers = array if plain else array.view("uint16")
        tensor = tf.experimental.dlpack.from_dlpack(numbers.__dlpack__())
        return tensor if plain else tf.bitcast(tensor, tf.bfloat16)
    if keras.config.backend() == "torch":
        import torch

        tensor = torch.from_numpy(array if plain else array.view("int16"))
        tensor = tensor if plain else tensor.view(torch.bfloat16)
        return ops.convert_to_tensor(tensor, dtype=dtype)
    return ops.convert_to_tensor(array, dtype=dtype)


class _Progress:
    """Shows a progress bar once loading has taken some seconds."""

    def __init__(self, total: int) -> None:
        self.start = time.monotonic()
        self.total, self.done = int(total), 0
        self.bar: Any = None

    def add(self, count: int) -> None:
        self.done += count
        if self.bar is None and time.monotonic() - self.start > _PATIENCE:
            # In millions, of which the last is begun until the end.
            target, unit = self.total // 10**6 + 1, "million weights"
            self.bar = keras.utils.Progbar(target, interval=1, unit_name=unit)
        if self.bar is not None:
            begun = self.done // 10**6 + (self.done == self.total)
            self.bar.update(begun)


def _present_names(
    architecture: Architecture, entries: list[Entry], shapes: dict[str, Shape]
) -> dict[str, str]:
    """Returns the name in the checkpoint of each name in the table."""
    present = {}
    for name in (name for entry in entries for name in entry.names):
        spelled = architecture.spellings(name)
        present[name] = next((x for x in spelled if x in shapes), spelled[-1])
    return present


def _is_left_out(
    architecture: Architecture,
    entry: Entry,
    names: dict[str, str],
    shapes: dict[str, Shape],
) -> bool:
    """Returns whether a checkpoint lacks what it may lack."""
    missing = {name for name in entry.names if names[name] not in shapes}
    return bool(missing) and missing <= {*architecture.optional}


def _drawn_entries(
    model: Any, entries: list[Entry], names: dict[str, str], shapes: dict[str, Shape]
) -> list[Entry]:
    """Returns the entries of a task's head that do not fit the checkpoint."""
    ours = {weight.path: tuple(weight.shape) for weight in model.weights}

    def fits(entry: Entry) -> bool:
        wanted = entry.conversion.tensor_shapes(
            [ours[path] for path in entry.paths], len(entry.names)
        )
        found = [shapes.get(names[name]) for name in entry.names]
        return all(
            x is not None and tuple(x) == tuple(y) for x, y in zip(found, wanted)
        )

    return [entry for entry in entries if entry.is_head and not fits(entry)]


def _check_tensors(
    architecture: Architecture,
    model: Any,
    entries: list[Entry],
    names: dict[str, str],
    shapes: dict[str, Shape],
    drawn: set[str],
) -> None:
    backbone = getattr(model, "backbone", model)
    ours = {weight.path: tuple(weight.shape) for weight in model.weights}
    problems = []
    for entry in entries:
        lacking = [path for path in entry.paths if path not in ours]
        if lacking:
            problems.append(f"the model has no {lacking}, of which {entry.names} is")
            continue
        expected = entry.conversion.tensor_shapes(
            [ours[path] for path in entry.paths], len(entry.names)
        )
        for name, shape in zip(entry.names, expected):
            found = shapes.get(names[name])
            if found is None:
                problems.append(f"missing: {name} {tuple(shape)}")
            elif tuple(found) != tuple(shape):
                problems.append(
                    f"misshapen: {name} is {tuple(found)}, and the model has "
                    f"{tuple(shape)}"
                )
    known = {path for entry in entries for path in entry.paths}
    trained = {weight.path for weight in model.trainable_weights} - drawn
    problems += [f"in no table: weight {path}" for path in sorted(trained - known)]
    surplus = sorted(set(shapes) - set(names.values()))
    problems += [
        f"surplus: {name} {tuple(shapes[name])}"
        for name in surplus
        if not architecture.is_ignored(name, backbone)
    ]
    if problems:
        raise ValueError(
            f"The checkpoint does not fit the model that its configuration describes "
            f"(model type '{architecture.model_type}'); nothing was loaded. "
            f"{len(problems)} differences:\n" + "\n".join(problems)
        )
