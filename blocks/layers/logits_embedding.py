"""An embedding whose logits are more than products with it."""

from __future__ import annotations

from typing import Any

import keras

from attention.contract import Shape, Tensor, add_bias


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class LogitsEmbedding(keras.layers.ReversibleEmbedding):
    """An embedding whose logits are scaled, as in T5, or have biases, as in BART.

    Args:
        *args: those of `keras.layers.ReversibleEmbedding`, also by keyword.
        logit_scale: float. What hidden states are multiplied by before the product.
        logit_bias: bool. Whether each token has a bias. It is not trained: published
            ones are zeros, or forbid tokens.

    Call arguments:
        inputs: integer tensor of token ids, of any shape; with `reverse`, hidden states
            of shape `(..., output_dim)`.
        reverse: bool. Whether to return logits.

    Returns:
        A tensor of shape `(..., output_dim)`; with `reverse`, `(..., input_dim)`.

    Example:

    >>> import numpy as np
    >>> from blocks.layers.logits_embedding import LogitsEmbedding
    >>> layer = LogitsEmbedding(input_dim=50, output_dim=16, logit_scale=0.25)
    >>> embedded = layer(np.array([[3, 1, 4]]))
    >>> layer(embedded, reverse=True).shape == (1, 3, 50)
    True

    Reference:

    - [Raffel et al., 2019](https://arxiv.org/abs/1910.10683)
    """

    def __init__(
        self,
        *args: Any,
        logit_scale: float = 1.0,
        logit_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.logit_scale, self.logit_bias = logit_scale, bool(logit_bias)

    def build(self, inputs_shape: Shape | None = None) -> None:
        super().build(inputs_shape)
        if self.logit_bias:
            self.bias = self.add_weight(
                (self.input_dim,), "zeros", name="bias", trainable=False
            )

    def call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        if not reverse:
            return super().call(inputs)
        logits = super().call(inputs * self.logit_scale, reverse=True)
        return add_bias(logits, self.bias) if self.logit_bias else logits

    @property
    def variable_serialization_spec(self) -> dict[Any, list[str]]:
        # What Keras saves of an embedding.
        own = ["bias"] if self.logit_bias else []
        spec = super().variable_serialization_spec
        return {mode: [*names, *own] for mode, names in spec.items()}

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {
            **config,
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
        }
