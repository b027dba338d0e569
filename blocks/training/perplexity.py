"""Perplexity of tokens."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract import Tensor
from blocks.training.token_crossentropy import TokenCrossentropy, leave_out


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Perplexity(keras.metrics.Mean):
    """Computes the perplexity: the exponential of the mean cross-entropy of tokens.

    The mean is over all tokens of all batches, each times its weight: so it depends
    neither on padding nor on how the data are batched.

    Args:
        ignore_class: int or `None`. Tokens with this target don't count.
        name: str.
        **kwargs: arguments of `keras.metrics.Metric`.

    Example:

    >>> import numpy as np
    >>> from blocks import Perplexity
    >>> perplexity = Perplexity()
    >>> perplexity.update_state([[0, 2]], np.log([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]))
    >>> round(float(perplexity.result()), 3)  # (0.5 * 0.1) ** -0.5
    4.472
    """

    def __init__(
        self, ignore_class: int | None = None, name: str = "perplexity", **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.ignore_class = ignore_class

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Any = None
    ) -> None:
        """Adds tokens.

        Args:
            y_true: integer tensor of shape `(batch, length)`.
            y_pred: logits of shape `(batch, length, vocabulary_size)`.
            sample_weight: weights of shape `(batch, length)` or `(batch,)`, or `None`.
        """
        y_true = ops.convert_to_tensor(y_true)
        loss = TokenCrossentropy(ignore_class=self.ignore_class)
        _, crossentropy, _ = loss.scores(y_true, ops.convert_to_tensor(y_pred))
        weights = leave_out(y_true, self.ignore_class, sample_weight)
        super().update_state(crossentropy, weights)

    def result(self) -> Tensor:
        return ops.exp(super().result())

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "ignore_class": self.ignore_class}
