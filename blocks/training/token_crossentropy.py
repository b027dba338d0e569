"""Cross-entropy of tokens, averaged over the real ones."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract import Tensor, check_fraction


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class TokenCrossentropy(keras.losses.Loss):
    """Computes the cross-entropy of logits, as the mean over the tokens that count.

    It is the loss of `CausalLM.compile(loss="auto")`. A batch's loss is the sum over
    its tokens, each times its weight, divided by the sum of the weights: so padding
    changes nothing. With it, `CausalLM` never holds the logits of all tokens, as long
    as all metrics are `blocks.Perplexity` or
    `keras.metrics.SparseCategoricalAccuracy`.

    Args:
        label_smoothing: float in [0, 1). The share of the target's probability that is
            spread evenly over the vocabulary.
        z_loss: float. The factor of `log(Z) ** 2` that is added for each token, where
            `Z` is the sum of the exponentials of its logits. It keeps logits small.
        ignore_class: int or `None`. Tokens with this target don't count.
        reduction: see `keras.losses.Loss`.
        **kwargs: arguments of `keras.losses.Loss`.

    Example:

    >>> import numpy as np
    >>> from blocks import TokenCrossentropy
    >>> logits = np.log([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]])
    >>> loss = TokenCrossentropy()
    >>> round(float(loss([[0, 2]], logits, sample_weight=[[1, 0]])), 3)  # -log(0.5)
    0.693

    References:

    - [Szegedy et al., 2016](https://arxiv.org/abs/1512.00567) (label smoothing)
    - [Chowdhery et al., 2022](https://arxiv.org/abs/2204.02311) (z-loss)
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_class: int | None = None,
        reduction: str | None = "mean_with_sample_weight",
        name: str = "token_crossentropy",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, reduction=reduction, **kwargs)
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        if not z_loss >= 0:
            raise ValueError(f"`z_loss` must be at least 0. Received: z_loss={z_loss}")
        self.z_loss = z_loss
        self.ignore_class = ignore_class

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Any = None
    ) -> Tensor:
        weights = leave_out(y_true, self.ignore_class, sample_weight)
        return super().__call__(y_true, y_pred, weights)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Returns the loss of each token.

        Args:
            y_true: integer tensor of shape `(batch, length)`.
            y_pred: logits of shape `(batch, length, vocabulary_size)`.

        Returns:
            A float tensor of shape `(batch, length)`.
        """
        return self.scores(y_true, y_pred)[0]

    def scores(self, targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the losses of tokens, their plain cross-entropies, and the hits.

        Args:
            targets: integer tensor of shape `(batch, length)`.
            logits: of shape `(batch, length, vocabulary_size)`.

        Returns:
            Three float32 tensors of shape `(batch, length)`. A hit is 1 where the target
            has the highest logit. Only the first two have gradients.
        """
        targets = ops.cast(targets, "int32")
        if self.ignore_class is not None:
            targets = ops.where(ops.equal(targets, self.ignore_class), 0, targets)
        # In lower precision several tokens often have the highest logit.
        ties = keras.backend.standardize_dtype(logits.dtype) != "float32"
        found = self._stacked(targets, ops.cast(logits, "float32"), ties)
        return found[0], found[1], ops.stop_gradient(found[2])

    def _stacked(self, targets: Tensor, logits: Tensor, ties: bool) -> Tensor:
        smoothing = self.label_smoothing

        def compute(logits: Tensor) -> tuple[Tensor, ...]:
            highest = ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True))
            powers = ops.exp(logits - highest)
            total = ops.sum(powers, axis=-1)
            normalizer = ops.log(total) + highest[..., 0]
            chosen = ops.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            crossentropies = normalizer - chosen
            losses = crossentropies
            if smoothing:
                uniform = normalizer - ops.mean(logits, axis=-1)
                losses = losses + smoothing * (uniform - crossentropies)
            if self.z_loss:
                losses = losses + self.z_loss * ops.square(normalizer)
            hits = chosen >= highest[..., 0]
            if ties:
                first = ops.cast(ops.argmax(logits, axis=-1), "int32")
                hits = ops.equal(first, targets)
            hits = ops.cast(hits, "float32")
            stacked = ops.stack([losses, crossentropies, hits])
            return stacked, powers, total, normalizer

        if keras.config.backend() == "jax":
            # Its compiler finds what is written out below.
            return compute(logits)[0]

        @ops.custom_gradient
        def with_gradients(logits: Tensor) -> Any:
            stacked, powers, total, normalizer = compute(logits)

            def gradients(*arguments: Tensor, upstream: Any = None) -> Tensor:
                given = arguments[0] if upstream is None else upstream
                of_losses, of_both = given[0], given[0] + given[1]
                of_normalizer = of_both + 2 * self.z_loss * normalizer * of_losses
                found = powers * (of_normalizer / total)[..., None]
                # Powers over their total at the targets.
                chosen = of_normalizer * ops.exp(-stacked[1])
                if smoothing:
                    even = (smoothing / found.shape[-1]) * of_losses
                    found, chosen = found - even[..., None], chosen - even
                chosen = chosen - of_both + smoothing * of_losses
                return _with_targets(found, targets, chosen)

            return stacked, gradients

        return with_gradients(logits)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            ignore_class=self.ignore_class,
        )
        return config


def leave_out(targets: Tensor, ignore_class: int | None, weights: Any) -> Any:
    """Returns the weights of tokens, with 0 where the target is `ignore_class`.

    Args:
        targets: integer tensor of shape `(batch, length)`.
        ignore_class: int or `None`.
        weights: of shape `(batch, length)` or `(batch,)`, or `None`.
    """
    if ignore_class is None:
        return weights
    counts = ops.cast(ops.not_equal(targets, ignore_class), "float32")
    return counts if weights is None else counts * for_tokens(weights, targets)


def for_tokens(weights: Any, targets: Tensor) -> Tensor:
    """Returns weights of rows or of tokens in a shape that fits `(batch, length)`."""
    weights = ops.cast(weights, "float32")
    # Their rank is not known on TensorFlow where a step is traced for both.
    return ops.reshape(weights, (ops.shape(targets)[0], -1))


def _with_targets(x: Tensor, indices: Tensor, numbers: Tensor) -> Tensor:
    """Returns a tensor with a number put into each row, at an index of the last axis."""
    # Nothing else may read it: TensorFlow then writes into it and copies nothing.
    flat = ops.reshape(x, (-1, x.shape[-1]))
    column = ops.reshape(indices, (-1,))
    places = ops.stack(
        [ops.arange(ops.shape(column)[0], dtype="int32"), column], axis=1
    )
    new = ops.scatter_update(flat, places, ops.reshape(numbers, (-1,)))
    return ops.reshape(new, ops.shape(x))
