"""The contestants on Keras: this library and KerasHub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np

from attention import RotaryAttention
from benchmarks.training_cases import ADAMW
from benchmarks.weights import ModelShape, keras_hub_name
from blocks import CausalLM, CustomBackbone, GatedFeedForward

EPSILON = 1e-5


@keras.saving.register_keras_serializable(package="benchmarks")
class LlamaBackbone(CustomBackbone):
    """Llama's architecture: rotary grouped-query attention, SwiGLU and RMS norms."""

    def create_attention_layer(self, inputs_shape: tuple, layer_index: int) -> Any:
        return RotaryAttention(self.num_heads, self.num_key_value_heads, use_bias=False)

    def create_ffn(self, inputs_shape: tuple, layer_index: int) -> Any:
        return GatedFeedForward(self.intermediate_dim)

    def create_norm(self, inputs_shape: tuple, layer_index: int) -> Any:
        return keras.layers.RMSNormalization(epsilon=self.layer_norm_epsilon)


def assign_weights(backbone: Any, weights: dict[str, np.ndarray]) -> None:
    """Assigns weights by path, all of them and no others.

    Raises:
        ValueError: if the names differ.
    """
    # A path may begin with the backbone's own name.
    found = {weight.path: weight for weight in backbone.weights}
    if set(found) != set(weights):
        names = sorted(set(found) ^ set(weights))[:6]
        raise ValueError(f"The weights' names differ from the backbone's: {names}")
    for name, weight in found.items():
        weight.assign(weights[name])


def pad_right(rows: list[list[int]], width: int) -> dict[str, np.ndarray]:
    """Returns prompts as `token_ids` and `padding_mask` of one width."""
    token_ids = np.zeros((len(rows), width), "int32")
    padding_mask = np.zeros((len(rows), width), "int32")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
        padding_mask[i, : len(row)] = 1
    return {"token_ids": token_ids, "padding_mask": padding_mask}


class CountingAdamW(keras.optimizers.AdamW):
    """AdamW that counts its calls: where steps are compiled, those of tracing."""

    calls = 0

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().apply(*args, **kwargs)


class KerasContestant:
    """The base of both contestants."""

    lm: Any

    def train(self, tokens: np.ndarray, rows: int) -> float:
        """Trains on batches of so many rows, and returns the mean loss."""
        inputs = tokens[:, :-1]
        x = {"token_ids": inputs, "padding_mask": np.ones_like(inputs)}
        options = {"batch_size": rows, "shuffle": False, "verbose": 0}
        return self.lm.fit(x, tokens[:, 1:], **options).history["loss"][-1]

    def traced_steps(self) -> int:
        """Returns a number that grows when a training step is traced to be compiled."""
        is_compiled = keras.config.backend() != "torch"
        return self.lm.optimizer.calls if is_compiled else 0

    def large_product(self, size: int) -> Callable[[], object]:
        """Returns a function that multiplies two matrices of so many rows."""
        matrix = keras.random.uniform((size, size))
        return lambda: float(keras.ops.matmul(matrix, matrix)[0, 0])

    def new_tokens(self, rows: list[list[int]], outputs: dict) -> list[list[int]]:
        """Returns the tokens after each prompt."""
        masks = np.asarray(outputs["padding_mask"]).astype(bool)
        pairs = zip(rows, np.asarray(outputs["token_ids"]), masks)
        return [tokens[mask][len(row) :].tolist() for row, tokens, mask in pairs]

    def logits(self, row: list[int]) -> np.ndarray:
        """Returns the logits after the last token of a row, without a KV cache."""
        outputs = self.lm(pad_right([row], len(row)))
        return keras.ops.convert_to_numpy(outputs[0, -1]).astype("float32")


class Ours(KerasContestant):
    """This library."""

    def backbone_class(self, shape: ModelShape) -> type[CustomBackbone]:
        """Returns the class of the backbone."""
        return CustomBackbone if shape.kind == "gpt2" else LlamaBackbone

    def load(
        self, shape: ModelShape, weights: dict[str, np.ndarray], dtype: str
    ) -> None:
        """Makes the model, compiled with defaults but for optimizer and sampler."""
        backbone = self.backbone_class(shape)(
            vocabulary_size=shape.vocabulary_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_key_value_heads=shape.num_key_value_heads,
            hidden_dim=shape.hidden_dim,
            intermediate_dim=shape.intermediate_dim,
            max_sequence_length=shape.positions,
            layer_norm_epsilon=EPSILON,
            learned_positions=shape.kind == "gpt2",
            dtype=dtype,
        )
        assign_weights(backbone, weights)
        self.lm = CausalLM(backbone)
        self.lm.compile(CountingAdamW(**ADAMW), sampler="greedy")

    def prepare(self, prompts: list[list[int]], max_length: int) -> Any:
        """Returns the inputs of `generate`; not timed."""
        return pad_right(prompts, max(map(len, prompts)))

    def generate(
        self,
        inputs: Any,
        max_length: int,
        max_new_tokens: int | None,
        stops: tuple[int, ...] | None,
    ) -> Any:
        """Generates; this is what is timed."""
        if max_new_tokens is not None:
            return self.lm.generate(
                inputs, stop_token_ids=stops, max_new_tokens=max_new_tokens
            )
        return self.lm.generate(inputs, max_length=max_length, stop_token_ids=stops)

    def compilations(self) -> int | None:
        """Returns the number of steps compiled so far."""
        return getattr(self.lm, "compilations", None)

    def cache_elements(self, prompts: list[list[int]], max_length: int) -> int | None:
        """Returns the number of elements in the KV cache after a prefill."""
        prefill = getattr(self.lm, "prefill", None)
        if prefill is None:
            return None
        inputs = self.prepare(prompts, max_length)
        cache = prefill(inputs, max_length=max_length).cache
        return sum(int(np.prod(x.shape)) for x in keras.tree.flatten(cache))


class KerasHub(KerasContestant):
    """KerasHub, with token inputs padded to `max_length`, as it needs them.

    Args:
        jit_compile: `"auto"`, which is the default of Keras, or `True` for XLA
            on TensorFlow too.
    """

    def __init__(self, jit_compile: Any = "auto") -> None:
        self.jit_compile = jit_compile

    def load(
        self, shape: ModelShape, weights: dict[str, np.ndarray], dtype: str
    ) -> None:
        """Makes the model."""
        common: dict[str, Any] = {
            "vocabulary_size": shape.vocabulary_size,
            "num_layers": shape.num_layers,
            "hidden_dim": shape.hidden_dim,
            "intermediate_dim": shape.intermediate_dim,
            "dtype": dtype,
        }
        if shape.kind == "gpt2":
            backbone = keras_hub.models.GPT2Backbone(
                num_heads=shape.num_heads,
                max_sequence_length=shape.positions,
                dropout=0.0,
                **common,
            )
            cls = keras_hub.models.GPT2CausalLM
        else:
            backbone = keras_hub.models.LlamaBackbone(
                num_query_heads=shape.num_heads,
                num_key_value_heads=shape.num_key_value_heads,
                layer_norm_epsilon=EPSILON,
                tie_word_embeddings=True,
                **common,
            )
            cls = keras_hub.models.LlamaCausalLM
        kind = shape.kind
        renamed = {keras_hub_name(kind, name): w for name, w in weights.items()}
        assign_weights(backbone, renamed)
        self.lm = cls(backbone, preprocessor=None)
        self.lm.compile(
            CountingAdamW(**ADAMW), sampler="greedy", jit_compile=self.jit_compile
        )

    def prepare(self, prompts: list[list[int]], max_length: int) -> Any:
        """Returns the inputs of `generate`; not timed."""
        return pad_right(prompts, max_length)

    def generate(
        self,
        inputs: Any,
        max_length: int,
        max_new_tokens: int | None,
        stops: tuple[int, ...] | None,
    ) -> Any:
        """Generates up to the width of the inputs; KerasHub has no other limit."""
        return self.lm.generate(dict(inputs), stop_token_ids=stops)

    def compilations(self) -> int | None:
        """Returns how many times TensorFlow has traced the generate function."""
        function = getattr(self.lm, "generate_function", None)
        count = getattr(function, "experimental_get_tracing_count", None)
        return None if count is None else int(count())
