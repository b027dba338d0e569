"""Files of a preset, which are all of one save, whenever it is interrupted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blocks.checkpoints.hugging_face import write_json

CHECKSUMS = "checksums.json"
# Within the preset: what is being written, and what is complete and to be moved.
_WRITING, _WRITTEN = ".writing", ".written"


@contextlib.contextmanager
def written_aside(
    folder: Any, weights: Sequence[Any] = (), shard: float | None = None
) -> Iterator[str]:
    """Opens a folder to write to; at the end its files replace those in a preset.

    An error or a crash before the end leaves the preset as it was. A crash while files
    are moved is made good by `finish_save`. Other files in the folder stay.

    Args:
        folder: str or path. The preset; it is made if need be.
        weights: the weights that will be written, for which room is reserved first:
            without it the HDF5 library ends the process.
        shard: number or `None`. The largest size of a file of weights in GB.

    Yields:
        str. The folder to write to.

    Raises:
        OSError: if the folder can't be written to, or there is no room.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    aside = folder / _WRITING
    # Of a save that was interrupted.
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        _reserve(aside, weights, shard)
        yield str(aside)
        names = _files(aside)
        # Others are text: people may change it, and damage to it is noticed.
        sums = {x: _checksum(aside / x) for x in names if _is_weights(x)}
        # Weights are replaced as a whole: a larger model has several files of them.
        sums = sums or _read_json(folder / CHECKSUMS)
        write_json(str(aside), CHECKSUMS, sums)
        for path in (*(aside / name for name in names), aside / CHECKSUMS, aside):
            _sync(path)
        aside.rename(folder / _WRITTEN)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(folder)
    finish_save(folder)


def finish_save(folder: Any) -> None:
    """Moves the files of a save that was interrupted when all had been written."""
    folder = pathlib.Path(folder)
    written = folder / _WRITTEN
    if not (written / CHECKSUMS).exists():
        shutil.rmtree(written, ignore_errors=True)
        return
    sums = _read_json(written / CHECKSUMS)
    for name in _files(written):
        if name != CHECKSUMS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (written / name).replace(folder / name)
    for name in _read_json(folder / CHECKSUMS):
        if name not in sums:
            (folder / name).unlink(missing_ok=True)
    # The last, as it says that there is something to move.
    (written / CHECKSUMS).replace(folder / CHECKSUMS)
    shutil.rmtree(written)
    _sync(folder)


def check_files(folder: Any) -> None:
    """Raises a `ValueError` if a preset's weights are not those that were saved."""
    folder = pathlib.Path(folder)
    wrong = []
    for name, checksum in _read_json(folder / CHECKSUMS).items():
        path = folder / name
        if not path.exists():
            wrong.append(f"{name} is missing")
        elif _checksum(path) != checksum:
            wrong.append(f"{name} has changed since")
    if wrong:
        raise ValueError(
            f"The preset '{folder}' is damaged: its weights are not those that were "
            f"saved. {'; '.join(wrong)}. Save or copy it again. (If you changed them on "
            f"purpose, delete {CHECKSUMS}.)"
        )


def _is_weights(name: str) -> bool:
    return name.endswith((".weights.h5", ".weights.json"))


def _reserve(folder: pathlib.Path, weights: Sequence[Any], shard: float | None) -> None:
    """Raises an `OSError` if there is no room for weights."""
    total = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in weights)
    largest = total if shard is None else min(total, int(shard * 1e9))
    if not hasattr(os, "posix_fallocate"):
        return
    size = total
    paths: list[pathlib.Path] = []
    try:
        while size > 0:
            paths.append(folder / f"reserved_{len(paths)}")
            with open(paths[-1], "wb") as file:
                # What is written besides the numbers is small.
                room = min(size, largest) * 101 // 100 + 2**16
                os.posix_fallocate(file.fileno(), 0, room)
            size -= largest
    except OSError as error:
        known = {
            errno.ENOSPC: "the disk is full",
            errno.EFBIG: "files may not be that large",
            errno.EDQUOT: "the quota is used up",
        }
        if error.errno not in known:
            # A file system on which room can't be reserved.
            return
        raise OSError(
            error.errno,
            f"The preset can't be saved: {known[error.errno]}. Its weights take "
            f"{total:,} bytes. What was there before is unchanged",
            str(folder.parent),
        ) from error
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _files(folder: pathlib.Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    )


def _checksum(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: pathlib.Path) -> dict[str, str]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _sync(path: pathlib.Path) -> None:
    """Waits until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Folders can't be synced everywhere.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
