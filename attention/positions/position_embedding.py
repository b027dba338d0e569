"""Learned position embeddings."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract.arguments import arguments_of, check_positive_int
from attention.contract.cached_layer import CachedLayer
from attention.contract.checks import check_sequence_shape
from attention.contract.roles import declare_axes
from attention.contract.types import Index, Initializer, Mask, Shape, Tensor
from attention.positions.arithmetic import token_positions


class PositionVectors(CachedLayer):
    """The base of layers whose outputs are a vector for each position."""

    def vectors(self, positions: Tensor) -> Tensor:
        """Returns the vectors of positions, `(..., width)`, in the compute dtype."""
        raise NotImplementedError

    def create_cache(self, batch_size: int, max_length: int) -> tuple:
        return ()

    def call(
        self,
        x: Tensor,
        padding_mask: Mask | None = None,
        cache: tuple | None = None,
        cache_update_index: Index | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, tuple]:
        if cache is not None and cache_update_index is None:
            raise ValueError(
                f"Layer '{self.name}' was called with `cache` but without "
                "`cache_update_index`, the position of its first token."
            )
        length = ops.shape(x)[1]
        positions = token_positions(cache_update_index, length, segment_ids)
        # (length, width), or (batch, length, width) where rows have their own positions
        outputs = self.vectors(positions)
        shape = (ops.shape(x)[0], *ops.shape(outputs)[-2:])
        outputs = ops.broadcast_to(outputs, shape)
        return outputs if cache is None else (outputs, ())


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class PositionEmbedding(PositionVectors):
    """A trainable vector for each position, as in GPT-2.

    It is a cached layer to learn the positions of the tokens it is called with. It
    keeps nothing, so its cache is `()`.

    Args:
        sequence_length: int. The number of positions.
        initializer: initializer of the embeddings. Defaults to `"glorot_uniform"`.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: tensor of shape `(batch, length, width)`. Only its shape matters.
        padding_mask: makes no difference.
        cache: `None` or `()`.
        cache_update_index: as for every `CachedLayer`.

    Returns:
        A tensor of shape `(batch, length, width)`, in the compute dtype; with a cache,
        `(outputs, ())`.

    Raises:
        ValueError: if the tokens reach beyond `sequence_length`.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from attention import PositionEmbedding
    >>> layer = PositionEmbedding(sequence_length=16)
    >>> x = np.zeros((2, 5, 8))
    >>> embedded = layer(x)
    >>> next_ones, _ = layer(x[:, :1], cache=(), cache_update_index=4)
    >>> bool(ops.all(ops.isclose(next_ones, embedded[:, 4:5])))
    True

    Reference:

    - [Radford et al., 2019](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf)
    """

    def __init__(
        self,
        sequence_length: int,
        initializer: Initializer = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sequence_length = check_positive_int("sequence_length", sequence_length)
        self.max_sequence_length = self.sequence_length
        self.initializer = keras.initializers.get(initializer)

    def build(self, inputs_shape: Shape) -> None:
        what = "token embeddings, not the token ids,"
        width = check_sequence_shape(self.name, inputs_shape, what)
        declare_axes(self, {"embeddings": (None, None)})
        self.position_embeddings = self.add_weight(
            name="embeddings",
            shape=(self.sequence_length, width),
            initializer=self.initializer,
        )

    def vectors(self, positions: Tensor) -> Tensor:
        positions = ops.minimum(positions, self.sequence_length - 1)
        embeddings = ops.convert_to_tensor(self.position_embeddings)
        embeddings = ops.cast(embeddings, self.compute_dtype)
        return ops.take(embeddings, positions, axis=0)

    def get_config(self) -> dict[str, Any]:
        return {**arguments_of(PositionEmbedding, self), **super().get_config()}
