"""Presets of backbones that KerasHub does not know: checks, saving and loading."""

from __future__ import annotations

import collections
import difflib
import functools
import glob
import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import keras
import keras_hub

from attention.contract import describe
from blocks.checkpoints import hugging_face, sizes
from blocks.checkpoints.gguf_file import GgufFile
from blocks.checkpoints.packages import require
from blocks.gguf_tokenizer import read_gguf_preprocessor
from blocks.hugging_face_files import read_generation_options
from blocks.preset_files import check_files, finish_save

# Of samples to train on, of published models that take longer ones.
_SEQUENCE_LENGTH = 1024
_DATA = ["*.json", "*.safetensors", "*.jinja", "*.h5", "assets/*"]


def check_registered(*objects: Any) -> None:
    """Raises a `ValueError` if the class of an object is not found again on loading."""
    for cls in (type(item) for item in objects if item is not None):
        name = keras.saving.get_registered_name(cls)
        if keras.saving.get_registered_object(name) is not cls:
            raise ValueError(
                f"{cls.__name__} is not registered with Keras, so a preset that "
                "holds it could not be loaded. Put `@keras.saving."
                'register_keras_serializable(package="my_package")` above the '
                "class. Nothing was written."
            )


def make_from_config(make: Callable, config: dict[str, Any]) -> Any:
    """Makes an object from its config, whatever a subclass has fixed of it.

    A subclass that calls `super().__init__(dropout=0.1, **kwargs)` has `dropout` in its
    config, and can't be passed it. Only Python's error says that.
    """
    try:
        return make(dict(config))
    except TypeError as error:
        twice = re.search(r"multiple values for .*argument '(\w+)'", str(error))
        if twice is None or twice[1] not in config:
            raise
        fixed = twice[1]
    rest = {key: value for key, value in config.items() if key != fixed}
    return make_from_config(make, rest)


def load_task(cls: type, preset: str, load_weights: bool, **kwargs: Any) -> Any:
    """Returns the task of a preset, as `CausalLM.from_preset`.

    KerasHub looks for a task class made for exactly the class of the saved backbone,
    and so finds none for a user's subclass.
    """
    if str(preset).endswith(".gguf") and os.path.isfile(preset):
        return _load_published(cls, GgufFile(preset), load_weights, **kwargs)
    if isinstance(preset, str) and preset in sizes.named_sizes():
        return _make_named(cls, preset, load_weights, **kwargs)
    folder = local_folder(preset)
    if hugging_face.is_published(folder):
        return _load_published(cls, folder, load_weights, **kwargs)
    finish_save(folder)
    if load_weights:
        check_files(folder)
    config = _read_json(folder, "config.json")
    task_config = _read_json(folder, "task.json")
    _find_class(folder, config)
    task_cls = _find_class(folder, task_config)
    is_another = not issubclass(task_cls, cls)
    # Tasks of encoders differ by their heads alone.
    if is_another and not all(
        hasattr(x, "adapt_preprocessor") for x in (cls, task_cls)
    ):
        raise ValueError(
            f"The preset '{folder}' holds a {task_cls.__name__}, which is no "
            f"{cls.__name__}. Load it with `{task_cls.__name__}.from_preset`."
        )
    if "backbone" not in kwargs:
        dtype = kwargs.pop("dtype", None)
        kwargs["backbone"] = _load_backbone(folder, config, load_weights, dtype)
    if "preprocessor" not in kwargs:
        kwargs["preprocessor"] = _load_preprocessor(folder, task_config)
        if is_another:
            adapt = cls.adapt_preprocessor  # type: ignore[attr-defined]
            kwargs["preprocessor"] = adapt(kwargs["preprocessor"], task_cls)
    if is_another:
        warnings.warn(
            f"The preset '{folder}' holds a {task_cls.__name__}: weights of "
            f"{cls.__name__}'s head are drawn, to be trained.",
            stacklevel=3,
        )
        return cls(**kwargs)
    task = task_cls(**{**task_config["config"], **kwargs})
    if load_weights and task.has_task_weights():
        name = "task.weights.h5"
        path = os.path.join(folder, name)
        _load(folder, name, lambda: task.load_task_weights(path), lambda: task)
    return task


def _make_named(cls: type, name: str, load_weights: bool, **kwargs: Any) -> Any:
    """Returns a task of a name's configuration."""
    if load_weights:
        raise ValueError(
            f"'{name}' is the name of a configuration and holds no weights. Pass "
            "`load_weights=False` for random ones, or load those of "
            f"'hf://{sizes.named_sizes()[name].handle}'."
        )
    if "backbone" not in kwargs:
        kwargs["backbone"] = sizes.make_backbone(name, kwargs.pop("dtype", None))
    return cls(**kwargs)


def _load_published(
    cls: type, source: str | GgufFile, load_weights: bool, **kwargs: Any
) -> Any:
    """Returns a task of a folder as transformers writes them, or of a GGUF file."""
    if "backbone" not in kwargs:
        dtype = kwargs.pop("dtype", None)
        kwargs["backbone"] = hugging_face.load_backbone(source, load_weights, dtype)
    if "preprocessor" not in kwargs:
        kwargs["preprocessor"] = _read_preprocessor(cls, source, kwargs["backbone"])
    options = {} if isinstance(source, GgufFile) else read_generation_options(source)
    if options:
        kwargs.setdefault("generation_options", options)
    return cls(**kwargs)


def _read_preprocessor(cls: Any, source: str | GgufFile, backbone: Any) -> Any:
    length = min(backbone.max_sequence_length, _SEQUENCE_LENGTH)
    if isinstance(source, GgufFile):
        arguments = read_gguf_preprocessor(source)
        return cls.preprocessor_class(**arguments, sequence_length=length)
    if not os.path.exists(os.path.join(source, "tokenizer.json")):
        return None
    return cls.preprocessor_class.from_hugging_face(
        source, length, vocabulary_size=backbone.vocabulary_size
    )


def local_folder(preset: str) -> str:
    """Returns the folder of a preset; a handle is downloaded."""
    if not isinstance(preset, (str, os.PathLike)):
        raise TypeError(
            "`preset` must be a folder or a handle such as 'hf://user/name'. "
            f"Received: preset={describe(preset)}"
        )
    preset = os.fspath(preset)
    scheme, _, handle = preset.partition("://")
    if scheme == "hf" and handle:
        huggingface_hub = require("huggingface_hub", "Handles of hf://")

        # Data only: neither code nor pickled weights.
        return huggingface_hub.snapshot_download(handle, allow_patterns=_DATA)
    if scheme == "kaggle" and handle:
        import kagglehub

        return kagglehub.model_download(handle)
    if not os.path.isdir(preset):
        names = difflib.get_close_matches(preset.lower(), sizes.known_sizes())
        raise ValueError(
            f"There is no preset folder '{preset}'. Pass a folder written by "
            "`save_to_preset`, a handle such as 'hf://user/name', or the name of a "
            f"configuration, such as {names or ['gpt2_base']}."
        )
    return preset


def _read_json(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        raise ValueError(
            f"The preset '{folder}' has no {name}, so it is incomplete or was "
            "not written by `CausalLM.save_to_preset`. Save it again."
        )
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} of the preset '{folder}' is damaged or truncated ({error}). "
            "Save the preset again."
        ) from error
    if not isinstance(content, dict) or "registered_name" not in content:
        raise ValueError(
            f"{name} of the preset '{folder}' is no configuration written by "
            "`save_to_preset`, as it has no `registered_name`, and none of transformers, "
            "whose config.json has a `model_type`. Save or download the folder again."
        )
    return content


def _find_class(folder: str, config: dict[str, Any]) -> Any:
    name, module = config["registered_name"], config.get("module") or ""
    if module.startswith("blocks.models."):
        # Of this library, but imported only where it is needed.
        importlib.import_module(module)
    cls = keras.saving.get_registered_object(name)
    if cls is None:
        raise ValueError(
            f"The preset '{folder}' holds a {config.get('class_name', name)}, "
            f"which is not registered with Keras as '{name}'. Import the module "
            "that defines the class before loading; there it must stand below "
            "`@keras.saving.register_keras_serializable(package="
            f'"{name.partition(">")[0]}")`.'
        )
    return cls


def _load_backbone(
    folder: str, config: dict[str, Any], load_weights: bool, dtype: Any
) -> Any:
    saved = config["config"].get("dtype")
    quantized = isinstance(saved, dict) and saved["class_name"] == "DTypePolicyMap"
    if dtype is None and quantized:
        # Quantized layers must be made as they were saved. A float dtype gives
        # way to the user's global policy, as in KerasHub.
        dtype = keras.dtype_policies.deserialize(saved)

    def make(load_weights: bool = load_weights) -> Any:
        return keras_hub.models.Backbone.from_preset(
            folder, load_weights=load_weights, dtype=dtype
        )

    return _load(folder, "model.weights.h5", make, lambda: make(False))


def _load_preprocessor(folder: str, task_config: dict[str, Any]) -> Any:
    if task_config["config"].get("preprocessor") is None:
        return None
    config = _read_json(folder, "preprocessor.json")
    _find_class(folder, config)
    tokenizer = config["config"].get("tokenizer")
    if isinstance(tokenizer, dict) and "registered_name" in tokenizer:
        _find_class(folder, tokenizer)
    preprocessor = keras.saving.deserialize_keras_object(config)
    if hasattr(preprocessor, "load_preset_assets"):
        load = functools.partial(preprocessor.load_preset_assets, folder)
        _load(folder, "the tokenizer's assets", load)
    return preprocessor


def _load(folder: str, what: str, load: Any, model: Any = None) -> Any:
    """Returns the result of `load`; says more than Keras if it fails.

    `what` is the name of what is loaded, and `model` returns the model whose weights
    are loaded, if any.
    """
    try:
        return load()
    except (OSError, EOFError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{what} of the preset '{folder}' can't be read: a file is missing "
            f"or truncated ({error}). Save the preset again."
        ) from error
    except ValueError as error:
        differences = [] if model is None else _differences(folder, what, model())
        if not differences:
            raise
        shown = "\n".join(differences[:20])
        raise ValueError(
            f"The weights of the preset '{folder}' don't fit the model that its "
            f"configuration describes. {len(differences)} have another shape:\n{shown}"
        ) from error


def _differences(folder: str, what: str, model: Any) -> list[str]:
    """Returns lines on the weights that have another shape in a file than in a model."""
    expected = collections.defaultdict(list)
    for weight in model.weights:
        expected[weight.path.rpartition("/")[0]].append(weight)
    differences = []
    # Large models have several files.
    files = os.path.join(glob.escape(folder), what.replace(".", "*.", 1))
    for path in sorted(glob.glob(files)):
        with h5py.File(path) as file:
            for layer, number, shape in _saved_shapes(file):
                for weight in expected[layer][number : number + 1]:
                    if shape != tuple(weight.shape):
                        differences.append(
                            f"{weight.path}: {shape} in the file, "
                            f"{tuple(weight.shape)} in the model"
                        )
    return differences


def _saved_shapes(group: Any, names: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Yields a layer's path, a number and a shape for each weight in a file of Keras."""
    for key, child in group.items():
        if key == "vars":
            for number, value in child.items():
                if number.isdigit():
                    yield "/".join(names), int(number), value.shape
        elif isinstance(child, h5py.Group):
            name = child["vars"].attrs.get("name") if "vars" in child else None
            yield from _saved_shapes(child, (*names, name) if name else names)
