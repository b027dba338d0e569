"""Packages that only checkpoints need."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str, what: str) -> ModuleType:
    """Returns the module of a package that may not be installed.

    Raises:
        ImportError: if it is not; it says how to install it. `what` is what needs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{what} need the package {package}: "
            '`pip install "keras-transformer-blocks[checkpoints]"`.'
        ) from error
