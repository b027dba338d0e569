"""Tiny models, data and slow references for the tests of `blocks`."""

from __future__ import annotations

import functools
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from attention import (
    AlibiBias,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    RotaryAttention,
    T5Attention,
)
from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone, GenerationSizes

VOCABULARY_SIZE = 60
PACKAGE = "keras_transformer_blocks_tests"


@keras.saving.register_keras_serializable(package=PACKAGE)
class MultiQueryBackbone(CustomBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return MultiQueryAttention(self.num_heads)


@keras.saving.register_keras_serializable(package=PACKAGE)
class GroupedBackbone(CustomBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return GroupedQueryAttention(self.num_heads, self.num_heads // 2)


@keras.saving.register_keras_serializable(package=PACKAGE)
class RotaryBackbone(CustomBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return RotaryAttention(self.num_heads, self.num_key_value_heads)


@keras.saving.register_keras_serializable(package=PACKAGE)
class T5Backbone(CustomBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return T5Attention(self.num_heads, num_buckets=8, max_distance=16)


@keras.saving.register_keras_serializable(package=PACKAGE)
class AlibiBackbone(CustomBackbone):
    def create_attention_layer(self, inputs_shape, layer_index):
        return MultiHeadAttention(self.num_heads, position=AlibiBias())


VARIANTS = {
    "mha": (CustomBackbone, True),
    "mqa": (MultiQueryBackbone, True),
    "gqa": (GroupedBackbone, True),
    "rotary": (RotaryBackbone, False),
    "t5": (T5Backbone, False),
    "alibi": (AlibiBackbone, False),
}


def make_backbone(cls: type = CustomBackbone, **overrides: Any) -> CustomBackbone:
    """A tiny backbone whose weights are large enough for outputs to vary."""
    arguments = {
        "vocabulary_size": VOCABULARY_SIZE,
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "max_sequence_length": 64,
        **overrides,
    }
    backbone = cls(**arguments)
    randomize(backbone)
    return backbone


def make_variant(name: str, **overrides: Any) -> CustomBackbone:
    cls, learned_positions = VARIANTS[name]
    return make_backbone(cls, learned_positions=learned_positions, **overrides)


def make_lm(
    backbone: Any = None,
    preprocessor: Any = None,
    sampler: Any = "greedy",
    **kwargs: Any,
) -> CausalLM:
    lm = CausalLM(backbone or make_backbone(), preprocessor, **kwargs)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler=sampler)
    return lm


# Sizes at which short sequences take many chunks, blocks of steps, and growth.
SMALL_SIZES = GenerationSizes(block_steps=4, few_tokens=2, min_chunk=3, min_capacity=8)
make_small_lm = functools.partial(make_lm, generation_sizes=SMALL_SIZES)


class EagerLM(CausalLM):
    """Not compiled on TensorFlow: tracing takes longer than a few steps untraced."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        eager = keras.config.backend() == "tensorflow"
        super().compile(*args, run_eagerly=eager, **kwargs)


def randomize(layer: keras.layers.Layer, seed: int = 1) -> None:
    """Gives all weights, those that start at zero too, values of their own."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_weights:
        shape = tuple(weight.shape)
        # Small embeddings: what the blocks add decides on the next token.
        scale = 0.3
        if "kernel" in weight.path:
            inputs = int(np.prod(shape[:-1])) if "output" in weight.path else shape[0]
            scale = 2.0 / np.sqrt(inputs)
        values = rng.normal(size=shape) * scale
        if weight.path.endswith(("/gamma", "/scale")):
            values = values + 1.0
        weight.assign(values.astype("float32"))


def byte_preprocessor(**kwargs: Any) -> CausalLMPreprocessor:
    """A preprocessor of lower-case letters: bytes 97 and up are left to the model."""
    arguments = {"sequence_length": 16, "end_token": 1, **kwargs}
    return CausalLMPreprocessor(keras_hub.tokenizers.ByteTokenizer(), **arguments)


def bpe_preprocessor(**kwargs: Any) -> CausalLMPreprocessor:
    """A preprocessor with as many tokens as `make_backbone` has."""
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = ["<pad>", "<s>", "</s>", *letters, "Ġ", "th", "he", "Ġt"]
    vocabulary += [f"<{i}>" for i in range(VOCABULARY_SIZE - len(vocabulary))]
    tokenizer = keras_hub.tokenizers.BytePairTokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["t h", "h e", "Ġ t"],
        unsplittable_tokens=["<pad>", "<s>", "</s>"],
    )
    arguments = {
        "sequence_length": 16,
        "start_token": "<s>",
        "end_token": "</s>",
        **kwargs,
    }
    return CausalLMPreprocessor(tokenizer, **arguments)


def prompts(rows: list[list[int]], width: int | None = None) -> dict[str, np.ndarray]:
    """Pads rows of tokens on the right."""
    width = width or max(len(row) for row in rows)
    token_ids = np.zeros((len(rows), width), "int32")
    padding_mask = np.zeros((len(rows), width), "int32")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
        padding_mask[i, : len(row)] = 1
    return {"token_ids": token_ids, "padding_mask": padding_mask}


RAGGED = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]


def rows_of(outputs: dict[str, np.ndarray]) -> list[list[int]]:
    """The real tokens of each row."""
    pairs = zip(outputs["token_ids"], outputs["padding_mask"])
    return [tokens[mask.astype(bool)].tolist() for tokens, mask in pairs]


def to_numpy(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(x)


def next_token_logits(lm: Any, rows: list[list[int]], width: int) -> np.ndarray:
    """Returns the logits after each row's last token, from the model without a cache."""
    outputs = to_numpy(lm(prompts(rows, width))).astype("float32")
    return np.stack([outputs[i, len(row) - 1] for i, row in enumerate(rows)])


def brute_force_greedy(
    lm: Any, rows: list[list[int]], limits: list[int], width: int = 32
) -> list[list[int]]:
    """Greedy continuation of each row up to its limit, without any cache."""
    rows = [list(row) for row in rows]
    while any(len(row) < limit for row, limit in zip(rows, limits)):
        logits = next_token_logits(lm, rows, width)
        for row, limit, scores in zip(rows, limits, logits):
            if len(row) < limit:
                row.append(int(scores.argmax()))
    return rows


def check_generation(lm: Any, length: int = 12) -> None:
    """Ragged prompts are continued as without a cache, each row on its own."""
    outputs = lm.generate(prompts(RAGGED), stop_token_ids=None, max_length=length)
    assert rows_of(outputs) == brute_force_greedy(lm, RAGGED, [length] * 3)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype("float64")
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
