"""The masked language model on any encoder backbone."""

from __future__ import annotations

from typing import Any, ClassVar

import keras
import keras_hub
from keras import ops

from attention.contract import Shape, Tensor
from blocks.encoder_task import EncoderTask
from blocks.quantized_head import logits_of
from blocks.training.token_crossentropy import TokenCrossentropy


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class TokenBias(keras.layers.Layer):
    """Adds a trainable number to the logits of each token."""

    def build(self, inputs_shape: Shape) -> None:
        self.bias = self.add_weight((inputs_shape[-1],), "zeros", name="bias")

    def call(self, logits: Tensor) -> Tensor:
        return logits + ops.cast(self.bias, logits.dtype)

    def compute_output_shape(self, inputs_shape: Shape) -> Shape:
        return tuple(inputs_shape)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class MaskedLM(EncoderTask, keras_hub.models.MaskedLM):
    """A model that guesses masked tokens, on any `blocks.CustomEncoderBackbone`.

    ```
    backbone ─► the masked positions ─► create_head_transform ─► token_embedding ─► + bias
    ```

    It trains as KerasHub's: the preprocessor masks other tokens in each epoch, and the
    targets are the tokens that were there.

    Args:
        backbone: a `blocks.CustomEncoderBackbone`, whose `create_head_transform` makes
            the head.
        preprocessor: a `keras_hub.models.MaskedLMPreprocessor`, or `None` for tokens.
        **kwargs: arguments of `keras_hub.models.MaskedLM`.

    Call arguments:
        inputs: a dict of what the backbone takes, and of `mask_positions`, integers of
            shape `(batch, masks)`: the positions whose tokens are guessed.

    Returns:
        Logits of shape `(batch, masks, vocabulary_size)`.

    Raises:
        TypeError: if `backbone` is no `blocks.CustomEncoderBackbone`.

    Example:

    >>> import numpy as np
    >>> from blocks import CustomEncoderBackbone, MaskedLM
    >>> backbone = CustomEncoderBackbone(50, 1, 2, 16, 32, max_sequence_length=32)
    >>> lm = MaskedLM(backbone)
    >>> tokens = np.array([[1, 7, 3, 9]])
    >>> x = {
    ...     "token_ids": tokens,
    ...     "padding_mask": np.ones_like(tokens),
    ...     "mask_positions": np.array([[2]]),
    ... }
    >>> _ = lm.fit(x, np.array([[8]]), verbose=0)
    >>> lm.predict(x, verbose=0).shape
    (1, 1, 50)

    Reference:

    - [Devlin et al., 2018](https://arxiv.org/abs/1810.04805)
    """

    task = "masked_lm"
    learns_tokens = True
    preprocessor_classes: ClassVar[dict[int, Any]] = {
        1: keras_hub.models.MaskedLMPreprocessor,
        2: keras_hub.models.RobertaMaskedLMPreprocessor,
    }

    def __init__(self, backbone: Any, preprocessor: Any = None, **kwargs: Any) -> None:
        # === Layers ===
        self.set_parts(backbone, preprocessor, kwargs)
        self.head_transform = self.make_transform()
        self.output_bias = TokenBias(dtype=backbone.dtype_policy, name="masked_lm_bias")
        # === Functional model ===
        positions = keras.Input((None,), dtype="int32", name="mask_positions")
        inputs = {**backbone.input, "mask_positions": positions}
        x = backbone(backbone.input)
        x = ops.take_along_axis(x, ops.expand_dims(positions, -1), axis=1)
        logits = logits_of(backbone.token_embedding, self.head_transform(x))
        outputs = self.output_bias(logits)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def compile(
        self, optimizer: Any = "auto", loss: Any = "auto", **kwargs: Any
    ) -> None:
        """Configures training, as KerasHub's `compile`.

        The default loss is the mean over the masked tokens, `blocks.TokenCrossentropy`.
        """
        if isinstance(loss, str) and loss == "auto":
            loss = TokenCrossentropy()
        super().compile(optimizer, loss, **kwargs)
