"""Packages that only checkpoints and pictures need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str, what: str, extra: str = "checkpoints") -> ModuleType:
    """Returns the module of a package that may not be installed.

    Raises:
        ImportError: if it is not; it says how to install it, by which `extra`. `what` is what
            needs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{what} need the package {package}: "
            f'`pip install "keras-transformer-blocks[{extra}]"`.'
        ) from error
