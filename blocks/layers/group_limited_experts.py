"""Experts in groups, of which each token sees a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from attention.contract import Tensor, describe
from blocks.layers.mixture_of_experts import MixtureOfExperts


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class GroupLimitedExperts(MixtureOfExperts):
    """Experts in groups: a token sees the best experts of its best groups.

    A group is as good as its best expert. On many devices, each with a group, a token is
    sent to a few of them only.

    Args:
        *args: those of `blocks.MixtureOfExperts`, also by keyword.
        groups: pair of ints. How many groups of experts there are, and of how many of
            them a token sees experts.
        scale: float. The factor of the weights of experts.

    Raises:
        ValueError: if the groups do not divide the experts.

    Example:

    >>> import numpy as np
    >>> from blocks.layers.group_limited_experts import GroupLimitedExperts
    >>> layer = GroupLimitedExperts(num_experts=8, intermediate_dim=32, groups=(4, 2))
    >>> layer(np.zeros((1, 3, 8))).shape == (1, 3, 8)
    True

    Reference:

    - [DeepSeek-V2, 2024](https://arxiv.org/abs/2405.04434)
    """

    def __init__(
        self,
        *args: Any,
        groups: Sequence[int] = (1, 1),
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.groups = list(groups)
        self.scale = scale
        count, seen = groups
        experts = self.num_experts // count * seen
        if self.num_experts % count or self.num_experts_per_token > experts:
            raise ValueError(
                "`groups` must be a number of groups that divides `num_experts`, and how "
                "many of them a token sees, with at least `num_experts_per_token` "
                f"experts. Received: groups={describe(groups)}, num_experts="
                f"{self.num_experts}, num_experts_per_token={self.num_experts_per_token}"
            )

    def choose(self, chances: Tensor) -> tuple[Tensor, Tensor]:
        count, seen = self.groups
        if seen < count:
            # (tokens, groups, experts of a group)
            grouped = ops.reshape(chances, (-1, count, self.num_experts // count))
            _, best = ops.top_k(ops.max(grouped, axis=-1), seen)
            kept = ops.sum(ops.one_hot(best, count, dtype=chances.dtype), axis=1)
            chances = ops.reshape(grouped * kept[..., None], (-1, self.num_experts))
        weights, experts = super().choose(chances)
        return weights * self.scale, experts

    def get_config(self) -> dict[str, Any]:
        own = {"groups": self.groups, "scale": self.scale}
        return {**super().get_config(), **own}
