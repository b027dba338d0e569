"""Decoder blocks whose attention and feed-forward layer read the same inputs."""

from __future__ import annotations

from attention.contract import Tensor
from blocks.custom_decoder import CustomDecoder


class ParallelDecoder(CustomDecoder):
    """A block whose attention and feed-forward layer read the same inputs.

    ```
    x ─┬─► attention_norm ─► self_attention ─► dropout ─► + ─►
       ├─► ffn_norm ─► ffn ─► dropout ────────────────────┤
       └──────────────────────────────────────────────────┘
    ```

    Its arguments and hooks are those of `CustomDecoder`. Each part has a norm of its
    own; with one name in `norm_names`, both have that one.

    Example:

    >>> import numpy as np
    >>> from blocks.parallel_decoder import ParallelDecoder
    >>> decoder = ParallelDecoder(intermediate_dim=32, num_heads=2)
    >>> decoder(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True

    Reference:

    - [Black et al., 2022](https://arxiv.org/abs/2204.06745)
    """

    def transform(  # type: ignore[override]
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        training: bool | None = None,
    ) -> Tensor:
        inputs = [getattr(self, name)(x) for name in self.norm_names]
        attended = self.self_attention(inputs[0], padding_mask=padding_mask)
        fed = self.ffn(inputs[-1])
        return x + self.residual_dropout(attended) + self.residual_dropout(fed)


class OneNormDecoder(ParallelDecoder):
    """A parallel block whose attention and feed-forward layer have one norm."""

    norm_names = ("attention_norm",)
