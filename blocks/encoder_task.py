"""What tasks on bidirectional encoders share: inputs, heads, saving and loading."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any, ClassVar

import keras
import keras_hub
from keras import ops

from attention.contract import Tensor, all_layers, declare_axes, describe
from blocks.checkpoint_mixin import PresetMixin
from blocks.checkpoints import hugging_face
from blocks.checkpoints.architecture import architecture_of
from blocks.custom_encoder_backbone import TYPES, CustomEncoderBackbone, TokenTypes
from blocks.fitting import FitMixin
from blocks.hooks import dtype_policy_scope, name_layer
from blocks.hugging_face_files import read_encoder_tokenizer, write_encoder_tokenizer
from blocks.presets import load_task, local_folder
from blocks.token_model import TokenModel
from blocks.training_data import is_tokens

# Of samples, of published models that take longer ones.
_SEQUENCE_LENGTH = 512
POOLINGS = ("cls", "mean")


class EncoderTask(FitMixin, TokenTypes, TokenModel, PresetMixin):
    """A task on a `CustomEncoderBackbone`; KerasHub's `Task` comes behind it.

    Attributes:
        task: str. What architectures call the task.
        preprocessor_classes: dict from the number of tokens between two texts to the
            class of the preprocessor of published models.
    """

    task: str = ""
    preprocessor_classes: ClassVar[dict[int, Any]] = {
        1: keras_hub.models.TextClassifierPreprocessor,
        2: keras_hub.models.RobertaTextClassifierPreprocessor,
    }
    backbone_cls = None
    preprocessor_cls = None
    learns_tokens = False

    def set_parts(self, backbone: Any, preprocessor: Any, rest: dict[str, Any]) -> None:
        """Sets the backbone and the preprocessor; all arguments are checked."""
        self.check_rest(rest)
        if not isinstance(backbone, CustomEncoderBackbone):
            raise TypeError(
                "`backbone` must be a `blocks.CustomEncoderBackbone`. Received: "
                f"backbone={describe(backbone)}"
            )
        self.backbone = backbone
        self.preprocessor = preprocessor

    def make_transform(self) -> Any:
        """Returns the layer between hidden states and the task's outputs."""
        with dtype_policy_scope(self.backbone.dtype_policy):
            layer = self.backbone.create_head_transform(self.task)
        if layer is None:
            return keras.layers.Identity()
        if not isinstance(layer, keras.layers.Layer):
            raise TypeError(
                f"`{type(self.backbone).__name__}.create_head_transform` must return a "
                f"Keras layer or None. It returned {describe(layer)}"
            )
        name_layer(layer, f"{self.task}_transform")
        for part in all_layers(layer):
            if isinstance(part, keras.layers.Dense):
                declare_axes(part, {"kernel": (None, None)})
        return layer

    def preprocess_samples(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> Any:
        """Returns samples of texts by the preprocessor; tokens as they are."""
        data = super().preprocess_samples(x, y, sample_weight)
        if is_tokens(x):
            return data
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if isinstance(x, dict):
            # KerasHub calls the types so; here they are documents of packed rows.
            x = {TYPES if k == "segment_ids" else k: v for k, v in x.items()}
            x = {name: value for name, value in x.items() if name in self.input}  # type: ignore[attr-defined]
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Any:
        """Loads a task from a preset, or a folder as transformers writes them.

        Args:
            preset: str. A folder written by `save_to_preset` or by transformers, or a
                handle such as `"hf://user/name"`.
            load_weights: bool. Whether to load the weights.
            **kwargs: `dtype`, for the backbone; other arguments are those of the class,
                and replace those that it was made with. Weights of the head that are
                missing or have another shape in a folder of transformers, or of another
                task's preset, are drawn, to be trained, with a warning.

        Returns:
            The task.

        Raises:
            ValueError: if the folder is missing, incomplete or damaged, or
                holds a class that is not registered with Keras.
        """
        folder = local_folder(preset)
        if not hugging_face.is_published(folder):
            return load_task(cls, folder, load_weights, **kwargs)
        dtype, compile = kwargs.pop("dtype", None), kwargs.pop("compile", True)
        options = {**cls.read_options(folder), **kwargs}

        def make(backbone: Any, config: dict[str, Any]) -> Any:
            found = dict(options)
            if "preprocessor" not in found:
                found["preprocessor"] = cls.read_preprocessor(folder, backbone)
            if hasattr(cls, "num_classes"):
                classes = len(config.get("id2label") or "01")
                found.setdefault("num_classes", classes)
            # An optimizer can't be made while weights are to come.
            return cls(backbone, **found, compile=False)  # type: ignore[call-arg]

        task = hugging_face.load_backbone(folder, load_weights, dtype, make)
        if compile:
            task.compile()
        return task

    @classmethod
    def adapt_preprocessor(
        cls, preprocessor: Any, task_class: type[EncoderTask]
    ) -> Any:
        """Returns this class's preprocessor for one of another task.

        One that is of neither is returned as it is.
        """
        known = task_class.preprocessor_classes.items()
        counts = [x for x, y in known if isinstance(preprocessor, y)]
        if not counts or type(preprocessor) in cls.preprocessor_classes.values():
            return preprocessor
        make = cls.preprocessor_classes[max(counts)]
        length = preprocessor.sequence_length
        return make(preprocessor.tokenizer, sequence_length=length)

    @classmethod
    def read_options(cls, folder: str) -> dict[str, Any]:
        """Returns what a published folder says of arguments of the class."""
        return {}

    @classmethod
    def read_preprocessor(cls, folder: str, backbone: Any) -> Any:
        """Returns the preprocessor of a published folder, if it has a tokenizer."""
        if not os.path.exists(os.path.join(folder, "tokenizer.json")):
            return None
        length = min(backbone.max_sequence_length, _SEQUENCE_LENGTH)
        sentences = pathlib.Path(folder, "sentence_bert_config.json")
        if sentences.is_file():
            said = json.loads(sentences.read_text(encoding="utf-8"))
            length = min(length, said.get("max_seq_length") or length)
        tokenizer = read_encoder_tokenizer(folder, backbone.vocabulary_size)
        classes = cls.preprocessor_classes
        make = classes.get(tokenizer.num_separators, classes[1])
        return make(tokenizer, sequence_length=length)

    def export_to_transformers(self, path: str, dtype: str | None = None) -> None:
        """Writes a folder that transformers loads, without a line of this library.

        Args:
            path: str. The folder; it is made if need be.
            dtype: str or `None`. `"float32"`, `"float16"` or `"bfloat16"`; `None` means
                the dtype of the weights.

        Raises:
            ValueError: if the backbone or the head computes what no published
                architecture does. It says what differs, and nothing is written.
        """
        published = architecture_of(self.backbone).backbone_class
        hook = "create_head_transform"
        if getattr(type(self.backbone), hook) is not getattr(published, hook):
            raise ValueError(
                f"`{type(self.backbone).__name__}.{hook}` makes a head of its own, and "
                "transformers has none that computes it. Nothing was written."
            )
        tokenizer: Any = getattr(self.preprocessor, "tokenizer", None)
        config = self.published_config()
        if getattr(tokenizer, "pad_token_id", None) is not None:
            config["pad_token_id"] = tokenizer.pad_token_id
        hugging_face.export_backbone(self, path, dtype, **config)
        write_encoder_tokenizer(path, tokenizer)

    def published_config(self) -> dict[str, Any]:
        """Returns what the configuration of transformers says of the task."""
        return {}


def pooled(hidden_states: Tensor, padding_mask: Tensor, pooling: str) -> Tensor:
    """Returns a vector for each row of hidden states.

    Args:
        hidden_states: tensor of shape `(batch, length, width)`.
        padding_mask: tensor of shape `(batch, length)`.
        pooling: str. `"cls"`: that of the first token; `"mean"`: the mean of all that
            are no padding.

    Returns:
        A tensor of shape `(batch, width)`.
    """
    if pooling == "cls":
        return hidden_states[:, 0]
    x = ops.cast(hidden_states, "float32")
    mask = ops.cast(padding_mask, "float32")[..., None]
    count = ops.maximum(ops.sum(mask, axis=1), 1.0)
    # What is padded may be anything.
    x = ops.sum(ops.where(mask > 0, x, 0.0), axis=1) / count
    return ops.cast(x, hidden_states.dtype)


def check_pooling(pooling: Any) -> str:
    """Returns the argument `pooling`, and checks it."""
    if pooling not in POOLINGS:
        raise ValueError(
            f"`pooling` must be one of {POOLINGS}. Received: pooling={describe(pooling)}"
        )
    return pooling
