"""Writing low-rank updates as PEFT and transformers read them."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from keras import ops

from attention.contract import all_layers
from blocks.checkpoints.architecture import architecture_of
from blocks.checkpoints.hugging_face import write_json
from blocks.checkpoints.packages import require


def export_lora(backbone: Any, folder: str, base_model: str | None = None) -> None:
    """Writes the updates of a backbone of a published architecture to a folder.

    A projection to heads has an update for each head, and published models have one
    matrix for all of them, or even for queries, keys and values. So the rank there is
    larger than here: each update is written with as many columns as its matrix can need.

    Args:
        backbone: a `blocks.CustomBackbone` with LoRA.
        folder: str. It is made if need be.
        base_model: `None`, or the folder or handle of the model that it updates.

    Raises:
        ValueError: if it has no updates, or no architecture is known for it.
    """
    updates = _updates(backbone)
    if not updates:
        raise ValueError(
            "There are no low-rank updates to write. Call `enable_lora(rank)` first."
        )
    architecture = architecture_of(backbone)
    shapes = {weight.path: tuple(weight.shape) for weight in backbone.weights}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for entry in architecture.entries(backbone):
        if not updates.keys() & set(entry.paths):
            continue
        parts = [updates.get(path) for path in entry.paths]
        arrays = [
            np.zeros(shapes[path], "float32") if part is None else part[0]
            for path, part in zip(entry.paths, parts)
        ]
        (name,), (matrix,) = entry.names, entry.conversion.save(arrays, 1)
        if getattr(entry.conversion, "transposed", False):
            matrix, transposed = matrix.T, True
        inputs = getattr(entry.conversion, "inputs", 1)
        # A kernel's axes are inputs, heads if there are some, and the last one.
        needed = [
            part[1] * math.prod(part[0].shape[inputs:-1]) for part in parts if part
        ]
        rank = min(*matrix.shape, sum(needed))
        module = name.removesuffix(".weight")
        ranks[module] = rank
        for letter, factor in zip("BA", _factors(matrix, rank)):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = factor
    os.makedirs(folder, exist_ok=True)
    save = require("safetensors.numpy", "Folders for transformers").save_file
    path = os.path.join(folder, "adapter_model.safetensors")
    save(tensors, path, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM"
        if architecture.encoder_layer_prefix
        else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": max(ranks.values()),
        # The factors are scaled already.
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder, "adapter_config.json", config)


def _updates(backbone: Any) -> dict[str, tuple[np.ndarray, int]]:
    """Returns what is added to kernels, by path, and the rank of the update."""
    found = {}
    for layer in all_layers(backbone):
        if not getattr(layer, "lora_enabled", False):
            continue
        path = next(w.path for w in layer.weights if w.name == "kernel")
        a, b = map(ops.convert_to_numpy, (layer.lora_kernel_a, layer.lora_kernel_b))
        update = (a @ b) * (layer.lora_alpha / layer.lora_rank)
        found[path] = update, layer.lora_rank
    return found


def _factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(outputs, rank)` and `(rank, inputs)` whose product is the matrix.

    It has no higher rank, so that random combinations of its columns span all of them.

    Reference:

    - [Halko et al., 2011](https://arxiv.org/abs/0909.4061)
    """
    matrix = matrix.astype("float64")
    mixed = matrix @ np.random.default_rng(0).normal(size=(matrix.shape[1], rank))
    basis, _ = np.linalg.qr(mixed)
    factors = basis, basis.T @ matrix
    return tuple(np.ascontiguousarray(x, "float32") for x in factors)  # type: ignore
