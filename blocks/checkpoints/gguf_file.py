"""Reading GGUF files: tensors by the names that they have in transformers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from attention.contract import describe
from blocks.checkpoints.architecture import Architecture
from blocks.checkpoints.conversions import Shape
from blocks.checkpoints.packages import require

# The model types of GGUF's names of architectures, where they differ.
_MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gptneox": "gpt_neox",
}
# Keys of configurations, and what their values are called in GGUF.
_CONFIG = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Files do not say by what attention is scaled: llama.cpp knows the models that divide the
# width by the heads for it by how many blocks they have.
_BLOCKS_OF_LARGEST = {"gemma2": 46, "gemma3": 62}
# Architectures that are written as they are in transformers, except for what
# `_restore` undoes.
_SUPPORTED = {"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"}


class GgufFile:
    """The tensors of a GGUF file, dequantized one at a time, and what it says of them.

    Args:
        path: str or path. The file.

    Raises:
        ImportError: if the package gguf is not installed.
        ValueError: if the file is damaged, or of an architecture that is not read.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        gguf = require("gguf", "GGUF files")
        self.path = os.fspath(path)
        try:
            reader = gguf.GGUFReader(self.path)
        except Exception as error:  # the package raises whatever it stumbles over
            raise ValueError(
                f"'{self.path}' is no GGUF file, or is damaged or truncated: {error}"
            ) from error
        self._gguf = gguf
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._names: dict[str, str] = {}
        self.kind = self.field("general.architecture")
        if self.kind not in _SUPPORTED:
            raise ValueError(
                f"'{self.path}' holds a model of architecture {self.kind!r}. Of GGUF "
                f"files {sorted(_SUPPORTED)} are read; load the model's folder of "
                "safetensors instead."
            )

    def field(self, name: str, default: Any = None) -> Any:
        """Returns the value of a key, or `default` where there is none."""
        field = self._fields.get(name)
        return default if field is None else field.contents()

    def config(self) -> dict[str, Any]:
        """Returns the configuration with the keys of transformers."""
        kind = self.kind
        config = {
            key: self.field(f"{kind}.{name}")
            for key, name in _CONFIG.items()
            if f"{kind}.{name}" in self._fields
        }
        config["model_type"] = _MODEL_TYPES.get(kind, kind)
        if kind == "llama" and config.get("sliding_window"):
            config["model_type"] = "mistral"
        config["vocab_size"] = self._shape("token_embd.weight")[0]
        config["tie_word_embeddings"] = "output.weight" not in self._tensors
        config["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        if kind in _BLOCKS_OF_LARGEST:
            config["query_pre_attn_scalar"] = None  # The size of a head.
            if config.get("num_hidden_layers") == _BLOCKS_OF_LARGEST[kind]:
                size = config["hidden_size"] // config["num_attention_heads"]
                config["query_pre_attn_scalar"] = size
        scaling = self.field(f"{kind}.rope.scaling.type")
        if scaling not in (None, "none"):
            factor = self.field(f"{kind}.rope.scaling.factor")
            length = self.field(f"{kind}.rope.scaling.original_context_length")
            config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
            if length is not None:
                key = "original_max_position_embeddings"
                config["rope_scaling"][key] = length
        if "rope_freqs.weight" in self._tensors:
            config["rope_scaling"] = self._llama3_scaling()
        return config

    def _llama3_scaling(self) -> dict[str, Any]:
        """Returns the scaling whose effect on each frequency is all that is stored."""
        factor = float(np.max(self._dequantize("rope_freqs.weight")))
        # Llama 3.1 and 3.2; published models have no other values.
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }

    def use_names_of(self, architecture: Architecture) -> None:
        """Calls tensors what the table of an architecture calls them."""
        layers = self.field(f"{self.kind}.block_count")
        arches = self._gguf.MODEL_ARCH_NAMES.items()
        arch = next(key for key, name in arches if name == self.kind)
        known = self._gguf.get_tensor_name_map(arch, layers)
        names = [*architecture.weights]
        for i in range(layers):
            prefix = architecture.layer_prefix.format(i=i)
            names += [prefix + name for name in architecture.layer_weights]
        for name in names:
            found = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if found in self._tensors:
                self._names[name] = found

    def shapes(self) -> dict[str, Shape]:
        named = {name: self._shape(found) for name, found in self._names.items()}
        rest = self._tensors.keys() - self._names.values() - {"rope_freqs.weight"}
        return {**named, **{name: self._shape(name) for name in sorted(rest)}}

    def _shape(self, name: str) -> Shape:
        # Sizes are in the order of memory.
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        found = self._names[name]
        return self._restore(found, self._dequantize(found))

    def _dequantize(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            # Read, not mapped: a mapped file counts as memory.
            data = np.fromfile(
                self.path, np.uint8, tensor.n_bytes, offset=tensor.data_offset
            )
            data = data.view(tensor.data.dtype).reshape(tensor.data.shape)
            found = self._gguf.dequantize(data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                f"Tensor '{name}' of '{self.path}' of type {tensor.tensor_type.name} "
                f"can't be dequantized: {error}. Received: {describe(tensor.shape)}"
            ) from error
        return found.reshape(self._shape(name))

    def _restore(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Undoes what the conversion to GGUF changes of an architecture's tensors."""
        if self.kind.startswith("gemma") and name.endswith("norm.weight"):
            return tensor - 1
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
        part = name.split(".")[-2]
        if self.kind != "llama" or part not in heads:
            return tensor
        # Rotated pairs lie side by side there, and half a head apart here.
        count = self.field(f"llama.attention.{heads[part]}")
        halves = tensor.reshape((count, -1, 2, *tensor.shape[1:]))
        return halves.swapaxes(1, 2).reshape(tensor.shape)
