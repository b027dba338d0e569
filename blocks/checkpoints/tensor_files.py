"""Reading tensors of a checkpoint's files, one at a time."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from blocks.checkpoints.conversions import Shape

# Of the safetensors format.
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# By the names that Keras has for them.
DTYPE_NAMES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in DTYPES.values()}
_MAX_HEADER = 100_000_000
# What reading JSON raises that is none, or nests too deeply, or holds something else.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
# The file of all tensors, or that which says in which files they are.
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint(Protocol):
    """Tensors by name, of which only those that are read are in memory."""

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of each tensor, by its name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        ...


class _Place(NamedTuple):
    path: pathlib.Path
    start: int
    dtype: Any
    shape: Shape


class SafetensorsFolder:
    """The tensors of a folder's `model.safetensors`, or of the files of its index.

    A tensor that is read is mapped, which is no copy, and can't be written to. It is
    mapped alone, as what is mapped counts as memory. Every place in a file is checked
    before anything is read.

    Args:
        folder: str or path.

    Raises:
        ValueError: if there are no such files, or one is damaged, or is outside of the
            folder.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = pathlib.Path(folder)
        self._places: dict[str, _Place] = {}
        for path in self._files():
            for name, place in _read_header(path).items():
                if name in self._places:
                    raise ValueError(
                        f"Tensor '{name}' is in two files of '{self.folder}': "
                        f"{self._places[name].path.name} and {path.name}."
                    )
                self._places[name] = place

    def _files(self) -> list[pathlib.Path]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        # As transformers, of a folder that has both.
        if single.exists():
            return [single]
        if not index.exists():
            raise ValueError(
                f"'{self.folder}' has no {SINGLE} and no {INDEX}. Only safetensors are "
                "read: pickled weights (pytorch_model.bin) could run code. Convert them "
                f"first. It has {sorted(path.name for path in self.folder.iterdir())}"
            )
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except _DAMAGE as error:
            raise ValueError(
                f"'{index}' is no index of safetensors files, or is damaged ({error})."
            ) from error
        for name in names:
            if not isinstance(name, str) or pathlib.PurePath(name).name != name:
                raise ValueError(
                    f"'{index}' names a file outside of its folder, which is not read: "
                    f"{name!r}"
                )
        return [self.folder / name for name in sorted(names)]

    def shapes(self) -> dict[str, Shape]:
        return {name: place.shape for name, place in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        place = self._places[name]
        if 0 in place.shape:
            return np.empty(place.shape, place.dtype)
        try:
            tensor = np.memmap(
                place.path, place.dtype, "r", place.start, place.shape or (1,)
            )
        except ValueError as error:
            raise ValueError(
                f"'{place.path}' was cut off while it was read."
            ) from error
        return tensor.view(np.ndarray).reshape(place.shape)


def _read_header(path: pathlib.Path) -> dict[str, _Place]:
    """Returns the places of a file's tensors."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, item in header.items():
            numbers = item["shape"] + item["data_offsets"]
            if not all(type(x) is int for x in numbers):
                raise ValueError(f"tensor '{name}' has sizes that are no integers")
            shape, (start, end) = tuple(item["shape"]), item["data_offsets"]
            if item["dtype"] not in DTYPES:
                raise ValueError(
                    f"tensor '{name}' has dtype {item['dtype']}; known are "
                    f"{sorted(DTYPES)}"
                )
            dtype = np.dtype(DTYPES[item["dtype"]])
            promised = math.prod(shape) * dtype.itemsize
            first = 8 + length
            if min((start, *shape), default=0) < 0 or end - start != promised:
                raise ValueError(
                    f"tensor '{name}' of shape {shape} and dtype {item['dtype']} needs "
                    f"{promised} bytes, and has those from {start} to {end}"
                )
            if first + end > size:
                raise ValueError(
                    f"tensor '{name}' ends at byte {first + end} of a file of {size}"
                )
            found[name] = _Place(path, first + start, dtype, shape)
    except (OSError, *_DAMAGE) as error:
        raise ValueError(
            f"'{path}' is missing, damaged or truncated: {error}"
        ) from error
    return found
