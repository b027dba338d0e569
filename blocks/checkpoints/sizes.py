"""Configurations of well-known models by name, as data without weights."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any, NamedTuple

from attention.contract import DType
from blocks.checkpoints.architecture import find_architecture


class Size(NamedTuple):
    """A published configuration.

    Attributes:
        handle: str. Where its weights are, on the Hugging Face hub.
        parameters: int. How many parameters they have.
        config: dict. What its `config.json` says, without what is of no use here.
    """

    handle: str
    parameters: int
    config: dict[str, Any]


@functools.cache
def named_sizes() -> dict[str, Size]:
    """Returns the published configurations, by name."""
    path = pathlib.Path(__file__).with_name("sizes.json")
    found = {}
    for family in json.loads(path.read_text(encoding="utf-8")).values():
        for name, (handle, parameters, *values) in family["sizes"].items():
            own = dict(zip(family["keys"], values, strict=True))
            found[name] = Size(handle, parameters, {**family["all"], **own})
    return found


def known_sizes() -> list[str]:
    """Returns the names of configurations that `CausalLM.from_preset` knows, sorted."""
    return sorted(named_sizes())


def make_backbone(name: str, dtype: DType = None) -> Any:
    """Returns the backbone of a name's configuration, with weights that are drawn."""
    config = named_sizes()[name].config
    architecture = find_architecture(config["model_type"])
    arguments = architecture.read_config(config)
    return architecture.backbone_class(**arguments, dtype=dtype)
