"""KerasHub's backbones as checkpoints."""

from __future__ import annotations

from typing import Any

import keras_hub
import numpy as np
from keras import ops

from attention.contract import DType, all_layers, describe
from blocks.checkpoints.architecture import find_architecture
from blocks.checkpoints.computed_weights import current_weights
from blocks.checkpoints.conversions import Shape
from blocks.checkpoints.keras_hub_models import KERAS_HUB_MODELS, KerasHubModel
from blocks.checkpoints.loading import load_weights


def convert_backbone(backbone: Any, dtype: DType = None) -> Any:
    """Returns our backbone with the arguments and weights of one of KerasHub.

    Args:
        backbone: a `keras_hub.models.Backbone`.
        dtype: the dtype or policy of all layers; `None` means the backbone's own.

    Raises:
        TypeError: if no table here is for its class.
        ValueError: if it is quantized, or computes what the architecture here does not.
    """
    classes = {
        getattr(keras_hub.models, model.hub_class): model for model in KERAS_HUB_MODELS
    }
    model = classes.get(type(backbone))
    if model is None:
        raise TypeError(
            "`task_or_backbone` must be a task or backbone of KerasHub. The backbones "
            f"that can be read are {sorted(cls.__name__ for cls in classes)}. "
            f"Received: {describe(backbone)}"
        )
    layers = all_layers(backbone)
    quantized = [x.path for x in layers if getattr(x, "quantization_mode", None)]
    if quantized:
        raise ValueError(
            f"The weights of `{type(backbone).__name__}` are quantized. Load the preset "
            "that was quantized, and call `quantize` on the result. Quantized: "
            f"{quantized[:3]}"
        )
    architecture = find_architecture(model.model_type_of(backbone))
    arguments = architecture.read_config(model.published_config(backbone))
    arguments["dropout"] = getattr(backbone, "dropout", 0.0)

    def make() -> Any:
        policy = backbone.dtype_policy if dtype is None else dtype
        return architecture.backbone_class(**arguments, dtype=policy)

    return load_weights(make, model, _Weights(model, backbone))


class _Weights:
    """The weights of a backbone of KerasHub as a checkpoint, by our paths."""

    def __init__(self, model: KerasHubModel, backbone: Any) -> None:
        current = current_weights(backbone)
        self.weights = {model.our_path(path): x for path, x in current.items()}

    def shapes(self) -> dict[str, Shape]:
        return {path: tuple(x.shape) for path, x in self.weights.items()}

    def read(self, name: str) -> np.ndarray:
        return ops.convert_to_numpy(self.weights[name])
