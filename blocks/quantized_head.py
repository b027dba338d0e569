"""Logits of a quantized embedding, with gradients."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract import Tensor
from blocks.checkpoints.computed_weights import dequantized


def logits_of(embedding: Any, hidden_states: Tensor) -> Tensor:
    """Returns an embedding's logits, `(batch, length, vocabulary_size)`.

    Keras (3.15) rounds the inputs of an embedding in 8 bits, where its weights are int8, or
    int4 and were loaded (not by `quantize("int4")`), and a rounded number has no
    gradient: nothing before the head would be trained. As Keras's own dense layers do,
    inputs get the gradient that they have without being rounded.
    """
    rounds = getattr(embedding, "inputs_quantizer", None) is not None
    # While a functional model is made, there is nothing to differentiate.
    if not rounds or isinstance(hidden_states, keras.KerasTensor):
        return embedding(hidden_states, reverse=True)

    @ops.custom_gradient
    def compute(hidden_states: Tensor) -> Any:
        def gradient(*arguments: Any, upstream: Any = None) -> Tensor:
            # Backends call it with other arguments.
            upstream = arguments[0] if upstream is None else upstream
            kernel = dequantized_head(embedding)
            return ops.cast(ops.matmul(upstream, kernel), hidden_states.dtype)

        return embedding(hidden_states, reverse=True), gradient

    return compute(hidden_states)


def dequantized_head(embedding: Any) -> Tensor:
    """Returns what a quantized embedding multiplies by, `(vocabulary_size, width)`."""
    found = dequantized(embedding)
    if "reverse_embeddings" in found:
        return ops.transpose(found["reverse_embeddings"])
    return found["embeddings"]
