"""The encoder block whose parts come from hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from attention.contract import (
    Shape,
    Tensor,
    build_as_one,
    change_context,
    rematerialize_tensors,
)
from blocks.transformer_block import TransformerBlock


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CustomEncoder(TransformerBlock):
    """A transformer encoder block with a hook for each of its parts.

    It is `CustomDecoder` without causality and without a cache: every token sees
    every other one of its row, so nothing could be computed before all are there.

    ```
    x ─┬─► attention_norm ─► self_attention ─► dropout ─► + ─┬─► ffn_norm ─► ffn ─► dropout ─► + ─►
       └──────────────────────────────────────────────────┘ └─────────────────────────────────┘
    ```

    A subclass overrides `create_attention_layer`, `create_ffn` or `create_norm` to
    change a part, `transform` to change how they are connected, and `norm_names` to
    have other norms, as for `CustomDecoder`.

    Args:
        intermediate_dim: int. The width inside the feed-forward layer.
        num_heads: int. The number of query heads.
        **kwargs: as for `CustomDecoder`: `num_key_value_heads`, `dropout`,
            `activation`, `layer_norm_epsilon`, `normalize_first`, initializers,
            `name`, `dtype`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        padding_mask: boolean tensor of shape `(batch, length)`: the real tokens;
            `None` means the mask that Keras attached to `x`, if any.
        training: bool. Whether to apply dropout.

    Returns:
        A tensor of the shape of `x`.

    Example:

    >>> import numpy as np
    >>> from blocks import CustomDecoder, CustomEncoder
    >>> encoder = CustomEncoder(intermediate_dim=64, num_heads=4)
    >>> decoder = CustomDecoder(intermediate_dim=64, num_heads=4)
    >>> source, x = np.zeros((1, 7, 16)), np.zeros((1, 3, 16))
    >>> decoder(x, encoder_sequence=encoder(source)).shape == (1, 3, 16)
    True

    Reference:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    causal = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.supports_masking = True

    build = build_as_one(TransformerBlock.build)

    def _add_part(self, name: str, hook: str, inputs_shape: Shape) -> Any:
        layer = super()._add_part(name, hook, inputs_shape)
        if getattr(layer, "causal", False):
            raise ValueError(
                f"`{hook}` of an encoder must return a layer made with `causal=False`, as "
                "its tokens see those that come later, too. It returned "
                f"{type(layer).__name__} with causal=True."
            )
        return layer

    def rematerialized_call(
        self, layer_call: Callable, *args: Any, **kwargs: Any
    ) -> Callable:
        return rematerialize_tensors(
            self, super().rematerialized_call, layer_call, args, kwargs
        )

    def call(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        training: bool | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        # `mask` is what Keras attached to `x`.
        padding_mask = mask if padding_mask is None else padding_mask
        # The layers of an encoder have no slots in the cache of a decoder.
        with change_context(scope=None, padding_mask=padding_mask):
            return self.transform(x, padding_mask=padding_mask, training=training)

    def transform(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        training: bool | None = None,
    ) -> Tensor:
        """Computes the block's outputs: its topology, written once, in plain Keras.

        Its arguments are those of the call.

        Returns:
            A tensor of the shape of `x`.
        """
        x = self.add_residual(
            x, self.attention_norm, self.self_attention, padding_mask=padding_mask
        )
        return self.add_residual(x, self.ffn_norm, self.ffn)
