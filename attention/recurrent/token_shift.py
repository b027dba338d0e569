"""The token shift of RWKV."""

from __future__ import annotations

import keras
from keras import ops

from attention.contract.arguments import check_positive_int
from attention.contract.cached_layer import CachedLayer
from attention.contract.checks import check_sequence_shape
from attention.contract.padding import last_tokens
from attention.contract.segments import segment_positions
from attention.contract.types import Cache, Index, Mask, Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class TokenShift(CachedLayer):
    """Gives each token the one before it; the first gets zeros.

    Call arguments:
        x: tensor of shape `(batch, length, width)`.
        padding_mask: as for every `CachedLayer`.
        cache: a cache made by `create_cache`: the last token of each row.
        cache_update_index: makes no difference.

    Returns:
        A tensor of the shape of `x`; with a cache, `(outputs, cache)`.

    Example:

    >>> import numpy as np
    >>> from attention import TokenShift
    >>> np.array(TokenShift()(np.array([[[1.0], [2.0], [3.0]]])))[0, :, 0].tolist()
    [0.0, 1.0, 2.0]

    Reference:

    - [Peng et al., 2023](https://arxiv.org/abs/2305.13048)
    """

    # How many earlier tokens an output depends on; the cache holds as many.
    _past = 1

    def build(self, inputs_shape: Shape) -> None:
        self._width = check_sequence_shape(self.name, inputs_shape)

    def create_cache(self, batch_size: int, max_length: int) -> Cache:
        if not self.built:
            raise ValueError(
                f"Layer '{self.name}' does not know the width of its inputs yet, so "
                "its cache can't be sized. Call it once, or call `build` with the "
                "shape of its inputs, before `create_cache`."
            )
        batch_size = check_positive_int("batch_size", batch_size)
        return ops.zeros((batch_size, self._past, self._width), self.compute_dtype)

    def call(
        self,
        x: Tensor,
        padding_mask: Mask | None = None,
        cache: Cache | None = None,
        cache_update_index: Index | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Cache]:
        if cache is None:
            # `zeros_like`, as the batch size may not be known.
            past = ops.repeat(ops.zeros_like(x[:, :1]), self._past, axis=1)
        else:
            past = ops.cast(cache, x.dtype)
        seen = ops.concatenate([past, x], axis=1)  # (b, past + l, w)
        outputs = self._mix(self._earlier(seen, ops.shape(x)[1], segment_ids))
        if cache is None:
            return outputs
        return outputs, ops.cast(
            last_tokens(seen, padding_mask, self._past), cache.dtype
        )

    def _earlier(
        self, seen: Tensor, length: int | Tensor, segment_ids: Tensor | None
    ) -> list[Tensor]:
        """Returns tokens of `(b, past + l, w)` before each token, the nearest last.

        A token of another document is zero. The last one is the token itself.
        """
        found = [seen[:, i : i + length] for i in range(self._past + 1)]
        if segment_ids is None:
            return found
        positions = segment_positions(segment_ids)[..., None]  # (b, l, 1)
        return [
            ops.where(positions >= self._past - i, x, 0) for i, x in enumerate(found)
        ]

    def _mix(self, seen: list[Tensor]) -> Tensor:
        """Returns the outputs from the tokens before each token, all `(b, l, w)`."""
        return seen[0]
