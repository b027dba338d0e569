"""Saving and loading language models, in presets and as others publish them."""

from __future__ import annotations

from typing import Any

import keras_hub

from attention.contract import DType, describe
from blocks.checkpoints import hugging_face
from blocks.checkpoints.keras_hub import convert_backbone
from blocks.checkpoints.peft_adapters import export_lora
from blocks.hugging_face_files import write_preprocessor
from blocks.preset_files import written_aside
from blocks.presets import check_registered, load_task
from blocks.swap import SwapReport, copy_weights_beside, swap_backbone


class PresetMixin:
    """Saving a task to a preset."""

    backbone: Any
    preprocessor: Any

    def save_to_preset(
        self, preset_dir: str, max_shard_size: float | None = 10
    ) -> None:
        """Saves the model, its weights and its tokenizer to a folder.

        It may hold a preset already: that one stays whole until the new one is, even if
        the process is killed or the disk is full. `from_preset` notices files that were
        damaged later.

        Keras merges LoRA's updates into what it saves. So the loaded model has none to
        train on, and where the weights are int8 or int4, they are quantized again with
        the updates in them, which changes outputs. To keep LoRA as it is, save the base
        before `enable_lora`, and the updates by `save_lora_weights`.

        Args:
            preset_dir: str. The folder; it is made if need be.
            max_shard_size: number or `None`. The largest size of a weights file
                in GB.

        Raises:
            OSError: if the folder can't be written to, or there is no room.
            TypeError: if the backbone is a plain Keras model.
            ValueError: if a class is not registered with Keras, so that the
                preset could not be loaded again. Nothing is written then.
        """
        if not isinstance(self.backbone, keras_hub.models.Backbone):
            raise TypeError(
                "Presets are made of `keras_hub.models.Backbone`s, such as "
                "`blocks.CustomBackbone`. Save this model with "
                '`save("model.keras")`. Nothing was written. Received: backbone='
                f"{describe(self.backbone)}"
            )
        tokenizer = getattr(self.preprocessor, "tokenizer", None)
        check_registered(self, self.backbone, self.preprocessor, tokenizer)
        weights = self.backbone.weights
        with written_aside(preset_dir, weights, max_shard_size) as folder:
            super().save_to_preset(folder, max_shard_size=max_shard_size)  # type: ignore[misc]


class CheckpointMixin(PresetMixin):
    """The methods of `CausalLM` that save, load and change a model as a whole."""

    generation_options: dict[str, Any]

    def export_to_transformers(self, path: str, dtype: str | None = None) -> None:
        """Writes a folder that transformers loads, without a line of this library.

        Weights that LoRA has updated are written as they are computed with; of tokenizers,
        a `blocks.JsonTokenizer` with its chat template and stop tokens. It is the road to
        servers that read such folders: vLLM, TGI, SGLang.

        Args:
            path: str. The folder; it is made if need be.
            dtype: str or `None`. `"float32"`, `"float16"` or `"bfloat16"`; `None` means
                the dtype of the weights.

        Raises:
            ValueError: if the model computes what no published architecture does, such
                as another attention or other logits. It says what differs, and nothing
                is written.
        """
        hugging_face.export_backbone(self, path, dtype)
        write_preprocessor(path, self.preprocessor, self.generation_options)

    def export_lora_to_peft(self, path: str, base_model: str | None = None) -> None:
        """Writes the low-rank updates alone, as PEFT and transformers read them.

        `AutoModelForCausalLM.from_pretrained(base_model).load_adapter(path)` then
        computes what this model does.

        Args:
            path: str. The folder; it is made if need be.
            base_model: `None`, or the folder or handle of the model without updates.

        Raises:
            ValueError: if there are no updates, or the backbone is of no published
                architecture.
        """
        export_lora(self.backbone, path, base_model)

    def merge_lora(self) -> Any:
        """Makes a model of plain weights, with the low-rank updates added to them.

        Its weights are floats where those of this model are quantized. This model stays
        as it is.

        Returns:
            The model, which has the same preprocessor and is not compiled.

        Raises:
            TypeError: if the backbone is no `blocks.CustomBackbone`.
        """
        return self.swap()[0]

    def swap(
        self, backbone_class: type | None = None, **changes: Any
    ) -> tuple[Any, SwapReport]:
        """Makes a model with other parts and the weights of this one.

        Weights whose path and shape are the same are kept. Where only the number of
        heads differs, fewer heads are the means of those that stood side by side, and
        more are copies; of another number of tokens the first are kept, and more are the
        mean of all. Other weights are as their initializers make them, to be trained.
        Updates of LoRA are added to weights, and quantized ones become floats. A head of a
        subclass is kept, too. This model stays as it is.

        Args:
            backbone_class: a subclass of `blocks.CustomBackbone`, usually one of this
                backbone's class with another hook; `None` means the same class.
            **changes: arguments of the backbone with other values.

        Returns:
            The model, which has the same preprocessor and is not compiled, and a
            `blocks.SwapReport`: the weights that were kept, adapted, new and dropped.

        Raises:
            TypeError: if a backbone is no `blocks.CustomBackbone`.

        Example:

        Multi-query attention, and a sliding window.

        >>> import keras
        >>> from attention import GroupedQueryAttention
        >>> from blocks import CausalLM, CustomBackbone
        >>> lm = CausalLM(CustomBackbone(50, 1, 4, 16, 32))
        >>> multi_query, report = lm.swap(num_key_value_heads=1)
        >>> report.adapted["transformer_layer_0/self_attention/key/kernel"]
        '4 heads averaged into 1'
        >>> @keras.saving.register_keras_serializable(package="doctest")
        ... class WindowBackbone(CustomBackbone):
        ...     def create_attention_layer(self, inputs_shape, layer_index):
        ...         return GroupedQueryAttention(self.num_heads, self.num_heads, window=8)
        >>> windowed, report = lm.swap(WindowBackbone)
        >>> report.new, report.dropped
        ([], [])
        """
        backbone, report = swap_backbone(self.backbone, backbone_class, changes)
        config = self.get_config()  # type: ignore[attr-defined]
        parts = {"backbone": backbone, "preprocessor": self.preprocessor}
        kept = {x: y for x, y in config.items() if x not in ("name", "trainable")}
        task: Any = type(self)(**{**kept, **parts})
        copy_weights_beside(self, task, report)
        return task, report

    @classmethod
    def from_preset(cls, preset: str, load_weights: bool = True, **kwargs: Any) -> Any:
        """Loads a model from a preset.

        Args:
            preset: str. A folder written by `save_to_preset`, or a handle such
                as `"hf://user/name"` or `"kaggle://user/model/keras/name"`; or, with
                `load_weights=False`, the name of a published configuration such as
                `"gpt2_base"` (`blocks.checkpoints.known_sizes()` lists them).
            load_weights: bool. Whether to load the weights.
            **kwargs: `dtype`, for the backbone; other arguments replace those
                the model was made with, such as `preprocessor`.

        Returns:
            A `CausalLM`, of the subclass that was saved.

        Raises:
            ValueError: if the folder is missing, incomplete or damaged, or
                holds a class that is not registered with Keras.

        Example:

        >>> import tempfile
        >>> from blocks import CausalLM, CustomBackbone
        >>> lm = CausalLM(CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lm.save_to_preset(folder)
        ...     restored = CausalLM.from_preset(folder)
        >>> restored.backbone.num_layers
        1
        """
        return load_task(cls, preset, load_weights, **kwargs)

    @classmethod
    def from_keras_hub(cls, task_or_backbone: Any, dtype: DType = None) -> Any:
        """Makes a model of the same weights as one of KerasHub, and its preprocessor.

        Args:
            task_or_backbone: a `keras_hub.models.CausalLM` or its backbone, as loaded by
                KerasHub's `from_preset`: of GPT-2, Llama, Mistral, Gemma, Qwen, Phi-3
                or Falcon.
            dtype: the dtype or policy of the new backbone; `None` means the same.

        Returns:
            A `CausalLM`. Its weights are copies.

        Raises:
            TypeError: if it is no such backbone; a subclass may compute anything.
            ValueError: if it is quantized, or has an option that is not computed here.

        Example:

        >>> import keras_hub
        >>> from blocks import CausalLM
        >>> hub = keras_hub.models.GPT2Backbone(50, 1, 2, 16, 32)
        >>> lm = CausalLM.from_keras_hub(hub)
        >>> lm.backbone.num_layers
        1
        """
        backbone = getattr(task_or_backbone, "backbone", task_or_backbone)
        preprocessor = getattr(task_or_backbone, "preprocessor", None)
        make: Any = cls
        return make(convert_backbone(backbone, dtype), preprocessor)
