"""Prompts in which some positions are embeddings and no tokens."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract import Shape, Tensor, describe
from blocks.generation.backbone_inputs import token_inputs
from blocks.generation.prompts import read_tokens
from blocks.generation.sources import Sources

NAMES = ("embeddings", "embedding_mask")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class ReplaceEmbeddings(keras.layers.Layer):
    """Puts other vectors in the place of the embeddings of some tokens."""

    def build(self, inputs_shape: Shape, *_: Any) -> None:
        self.built = True

    def call(
        self, x: Tensor, embeddings: Tensor = None, embedding_mask: Tensor = None
    ) -> Tensor:
        if embeddings is None:
            return x
        if embedding_mask is None:
            raise ValueError("`embeddings` need an `embedding_mask`.")
        replaced = ops.cast(embedding_mask, "bool")[..., None]
        return ops.where(replaced, ops.cast(embeddings, x.dtype), x)

    def compute_output_shape(self, inputs_shape: Shape, *_: Any) -> Shape:
        return tuple(inputs_shape)


class EmbeddingInputs:
    """Lets prompts of a backbone hold embeddings in the place of tokens.

    It stands before a `blocks.CustomBackbone` among the base classes. The backbone and
    its `CausalLM` then take two inputs more, which need not be given: `embeddings`, `(batch,
    length, hidden_dim)`, and `embedding_mask`, `(batch, length)`, true where the vector
    takes the place of the token's embedding (before positions are added): those of an
    image or of audio, say. They are for `fit`, and for prompts of `generate`, `stream`,
    `start` and turns of its sessions, `prefill` and `score`. Tokens in their places have no
    meaning, but `score` and penalties count them.

    Example:

    >>> import keras, numpy as np
    >>> from blocks import CausalLM, CustomBackbone, EmbeddingInputs
    >>> @keras.saving.register_keras_serializable(package="doctest")
    ... class ImageBackbone(EmbeddingInputs, CustomBackbone):
    ...     pass
    >>> lm = CausalLM(ImageBackbone(50, 1, 2, 16, 32, max_sequence_length=32))
    >>> lm.compile(sampler="greedy")
    >>> prompt = {
    ...     "token_ids": np.array([[0, 0, 7]]),  # two patches, then a token
    ...     "embeddings": np.random.normal(size=(1, 3, 16)),
    ...     "embedding_mask": np.array([[1, 1, 0]]),
    ... }
    >>> out = lm.generate(prompt, max_new_tokens=4, stop_token_ids=None)
    >>> out["token_ids"].shape
    (1, 7)
    """

    prompt_inputs = NAMES
    hidden_dim: int
    _embedded: list[Any]

    def _connect(self) -> tuple[Any, Any]:
        inputs = token_inputs()
        like: Any = {"name": NAMES[0], "optional": True}
        inputs[NAMES[0]] = keras.Input((None, self.hidden_dim), **like)
        like = {"name": NAMES[1], "optional": True, "dtype": "int32"}
        inputs[NAMES[1]] = keras.Input((None,), **like)
        # `embed` calls `add_positions`, which puts them in.
        self._embedded = [inputs[name] for name in NAMES]
        mask = inputs["padding_mask"]
        x = self.embed(inputs["token_ids"], mask)  # type: ignore[attr-defined]
        self._embedded = []
        return inputs, self.layer_norm(self.transform(x, mask))  # type: ignore[attr-defined]

    def add_positions(self, x: Tensor, padding_mask: Tensor, side: str = "") -> Tensor:
        replace = ReplaceEmbeddings(name="replace_embeddings")
        x = replace(x, *self._embedded)
        return super().add_positions(x, padding_mask, side)  # type: ignore[misc]


def read_embeddings(inputs: dict[str, Any], width: int) -> tuple[Sources, Any]:
    """Returns the embeddings among the inputs of `generate`, and the tokens.

    Raises a `ValueError` if they do not fit the tokens, or have another width.
    """
    tokens = {name: x for name, x in inputs.items() if name not in NAMES}
    ids, _, is_single = read_tokens(tokens.get("token_ids"), tokens.get("padding_mask"))
    if inputs.get(NAMES[1]) is None:
        raise ValueError(
            "`embeddings` need an `embedding_mask`: which of them take the place of tokens. "
            f"Received: inputs={describe(inputs)}"
        )
    found = {name: np.asarray(ops.convert_to_numpy(inputs[name])) for name in NAMES}
    found = {name: x[None] if is_single else x for name, x in found.items()}
    shapes = [(*ids.shape, width), ids.shape]
    for (name, x), shape in zip(found.items(), shapes):
        if x.shape != shape:
            raise ValueError(
                f"`{name}` must have the shape {shape}, for tokens of shape {ids.shape}. "
                f"Received: {name}={describe(inputs[name])}"
            )
    mask = found[NAMES[1]].astype("int32")
    return {NAMES[0]: found[NAMES[0]].astype("float32"), NAMES[1]: mask}, tokens
