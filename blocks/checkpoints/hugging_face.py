"""Reading and writing folders as transformers writes them."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract import DType, all_layers, describe
from blocks.checkpoints.architecture import (
    Architecture,
    architecture_of,
    find_architecture,
)
from blocks.checkpoints.computed_weights import current_weights
from blocks.checkpoints.gguf_file import GgufFile
from blocks.checkpoints.loading import load_weights, weights_from
from blocks.checkpoints.mxfp4 import unpacked
from blocks.checkpoints.packages import require
from blocks.checkpoints.tensor_files import (
    DTYPE_NAMES,
    INDEX,
    SINGLE,
    SafetensorsFolder,
)

_SHARD_BYTES = 5 * 10**9
# Keys of configurations whose values have keys themselves.
_OBJECTS = ("quantization_config", "rope_parameters", "rope_scaling", "text_config")


def is_published(folder: str) -> bool:
    """Returns whether a folder's `config.json` is one of transformers."""
    try:
        return "model_type" in _read_config(folder)
    except ValueError:
        return False


def _read_config(folder: str) -> dict[str, Any]:
    path = pathlib.Path(folder, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_as_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is missing or damaged: {error}") from error
    return config if isinstance(config, dict) else {}


def _as_number(item: dict[str, Any]) -> Any:
    """Returns what transformers writes as `{"__float__": "Infinity"}` as a number."""
    return float(item["__float__"]) if item.keys() == {"__float__"} else item


def load_backbone(
    source: str | GgufFile,
    with_weights: bool = True,
    dtype: DType = None,
    make_task: Callable[[Any, dict[str, Any]], Any] | None = None,
) -> Any:
    """Returns the backbone of a published checkpoint, or a task.

    Args:
        source: str or `GgufFile`. A folder as transformers writes them, or a file.
        with_weights: bool. Whether to read its weights, or draw some.
        dtype: the dtype or policy of all layers; `None` means Keras's own.
        make_task: `None`, or called with the backbone and the configuration: makes the
            task whose head is to be read, too.

    Raises:
        ValueError: if its architecture is unknown, its configuration asks for what is
            not computed here, or its tensors do not fit.
    """
    if isinstance(source, GgufFile):
        config = source.config()
    else:
        config = _read_config(source)
    architecture = find_architecture(config["model_type"])
    for key in _OBJECTS:
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(
                f"The configuration of '{source}' is damaged: '{key}' must be an object "
                f"or null. Received: {key}={describe(config[key])}"
            )
    quantized = config.get("quantization_config")
    if with_weights and quantized and quantized.get("quant_method") != "mxfp4":
        raise ValueError(
            f"The weights of '{source}' are quantized: "
            f"{quantized.get('quant_method')!r}. Load the "
            "checkpoint that was quantized, and call `quantize` on it, or pass a GGUF "
            "file."
        )
    arguments = architecture.read_config(config)

    def make() -> Any:
        backbone = architecture.backbone_class(**arguments, dtype=dtype)
        return backbone if make_task is None else make_task(backbone, config)

    if not with_weights:
        return make()
    if not isinstance(source, GgufFile):
        return load_weights(make, architecture, unpacked(SafetensorsFolder(source)))
    source.use_names_of(architecture)
    return load_weights(make, architecture, source)


def export_backbone(
    model: Any, folder: str, dtype: str | None = None, **config: Any
) -> None:
    """Writes a backbone's, or a task's, configuration and weights for transformers.

    Args:
        model: a `blocks.CustomBackbone` of a published architecture, or a task on one
            whose head is to be written, too.
        folder: str. It is made if need be.
        dtype: str or `None`. The dtype of the tensors; `None` means that of the weights.
        **config: what is written into the configuration besides.

    Raises:
        ValueError: if no published architecture computes what the backbone does. It
            says what differs, and nothing is written.
    """
    if dtype is not None and dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(
            "`dtype` must be 'float32', 'float16', 'bfloat16' or None. Received: "
            f"dtype={describe(dtype)}"
        )
    backbone = getattr(model, "backbone", model)
    architecture = architecture_of(backbone)
    task = getattr(model, "task", "backbone")
    written_class = architecture.classes.get(task, architecture.transformers_class)
    if not written_class:
        raise ValueError(
            f"transformers has no model that computes what a {type(backbone).__name__} "
            f"does: '{architecture.model_type}' is read here and not written. Nothing "
            "was written. `save_to_preset` saves the model."
        )
    config = {**architecture.write_config(backbone), **config}
    config["architectures"] = [written_class]
    _check_same_computation(architecture, model, config)
    os.makedirs(folder, exist_ok=True)
    written = dtype or backbone.token_embedding.variable_dtype
    _write_tensors(pathlib.Path(folder), _tensors(architecture, model, dtype))
    write_json(folder, "config.json", {**config, "dtype": written})


def write_json(folder: str, name: str, content: dict[str, Any]) -> None:
    """Writes a dict into a file of a folder."""
    path = pathlib.Path(folder, name)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tensors(
    architecture: Architecture, model: Any, dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and tensors, a few in memory at a time."""
    values = current_weights(model)
    for entry in architecture.entries(model):
        arrays = [ops.convert_to_numpy(values[path]) for path in entry.paths]
        tensors = entry.conversion.save(arrays, len(entry.names))
        for name, tensor in zip(entry.names, tensors):
            kind = DTYPE_NAMES[dtype] if dtype else tensor.dtype
            yield name, np.ascontiguousarray(tensor, kind)


def _write_tensors(
    folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]]
) -> None:
    """Writes one file, or shards and their index, in place of those that are there."""
    safetensors = require("safetensors.numpy", "Folders for transformers")
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    sizes = 0

    def write() -> None:
        path = folder / f"part-{len(shards)}"
        safetensors.save_file(held, path, metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        bytes_held = sum(x.nbytes for x in held.values())
        if held and bytes_held + tensor.nbytes > _SHARD_BYTES:
            write()
        held[name] = tensor
        sizes += tensor.nbytes
    write()
    files, count = [SINGLE], len(shards)
    if count > 1:
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        # An interruption must not leave one that names old and new shards.
        (folder / INDEX).unlink(missing_ok=True)
    for i, file in enumerate(files):
        (folder / f"part-{i}").replace(folder / file)
    if count > 1:
        weight_map = {
            name: file for file, names in zip(files, shards) for name in names
        }
        index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
        write_json(str(folder), INDEX, index)
        files.append(INDEX)
    # Those of the checkpoint that was there before.
    others = folder.glob("model-?????-of-?????.safetensors")
    for path in (folder / INDEX, folder / SINGLE, *others):
        if path.name not in files:
            path.unlink(missing_ok=True)


def _check_same_computation(
    architecture: Architecture, model: Any, config: dict[str, Any]
) -> None:
    """Raises an error if the architecture's model computes something else."""
    backbone = getattr(model, "backbone", model)
    arguments = architecture.read_config(config)
    with weights_from(
        lambda weights: lambda weight: ops.zeros(weight.shape, weight.dtype)
    ):
        published = architecture.backbone_class(**arguments, dtype="bfloat16")
    ours, theirs = _parts(backbone), _parts(published)
    if model is not backbone:
        # The class of this library that a user's task is a subclass of.
        known = (x for x in type(model).__mro__ if x.__module__.startswith("blocks."))
        theirs["the task"] = _methods(next(known), _OF_TASKS)
        ours["the task"] = _methods(type(model), _OF_TASKS)
    differences = []
    for path in sorted({*ours, *theirs}):
        if ours.get(path) == theirs.get(path):
            continue
        mine, other = ours.get(path), theirs.get(path)
        if mine is None or other is None:
            where = "only here" if other is None else "missing here"
            differences.append(f"{path}: {where}")
            continue
        changed = [
            f"{key}={_name(mine.get(key))}, published {_name(other.get(key))}"
            for key in sorted({*mine, *other})
            if mine.get(key) != other.get(key)
        ]
        differences.append(f"{path}: {'; '.join(changed)}")
    if differences:
        shown = "\n".join(differences[:20])
        raise ValueError(
            "No architecture of transformers computes what this model of a "
            f"{type(backbone).__name__} does, so nothing was written. Compared with "
            f"'{architecture.model_type}', {len(differences)} parts differ:\n{shown}"
        )


# What changes no outputs, or only those of training.
_IRRELEVANT = {"name", "dtype", "trainable", "cache_dtype", "dropout", "seed", "rate"}
_IRRELEVANT |= {"shared_object_id"}


def _relevant(config: dict[str, Any]) -> dict[str, Any]:
    """Returns what changes outputs in a configuration, and in those within it."""
    return {
        key: _relevant(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _IRRELEVANT
        and not key.endswith(("initializer", "regularizer", "constraint"))
        and not key.startswith(("lora", "quantization", "in_backbone"))
    }


def _parts(backbone: Any) -> dict[str, dict[str, Any]]:
    """Returns what each layer within a backbone is made of, by path."""
    found = {}
    for layer in all_layers(backbone):
        # A layer drops outputs in training only, and is not made for a rate of 0. Models
        # are made of the layers that are found besides.
        kinds = (keras.layers.InputLayer, keras.layers.Dropout, keras.Model)
        if layer is backbone or isinstance(layer, kinds):
            continue
        config = layer.get_config()
        # In a configuration a function is a name, which another one may have, too.
        given = {key: getattr(layer, key, None) for key in config}
        config |= {key: x for key, x in given.items() if inspect.isfunction(x)}
        kept = _relevant(config)
        if hasattr(layer, "add_residual"):
            # A block: the parts that its other methods make are compared themselves.
            kept |= _methods(type(layer), _OF_BLOCKS)
        else:
            kept["class"] = type(layer)
        found[layer.path or layer.name] = kept
    found[""] = _methods(type(backbone), _OF_BACKBONES)
    return found


def _methods(cls: type, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns those methods of a class that it has."""
    return {name: getattr(cls, name) for name in names if hasattr(cls, name)}


def _name(value: Any) -> str:
    """Returns a class or function by its full name, and anything else as it is."""
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


# The methods that connect layers.
_OF_BACKBONES = (
    "call",
    "transform",
    "embed",
    "add_positions",
    "transform_source",
    "embed_source",
)
_OF_BLOCKS = ("call", "transform", "add_residual")
_OF_TASKS = ("call", "compute_hidden_states", "compute_logits", "classify")
