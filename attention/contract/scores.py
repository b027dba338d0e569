"""The weights of attention, collected from whatever model computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attention.contract.context import change_context, context
from attention.contract.types import Tensor


@contextmanager
def ScoreScope() -> Iterator[list[tuple[Any, Tensor]]]:
    """Collects the weights of all attention that is called inside.

    A model needs no line for that, whatever its topology: each softmax attention adds
    what it returns with `return_attention_scores=True`, and its outputs stay the same.
    The scope is for a call of the model, not for `generate` or `fit`, whose compiled
    functions no tensor can leave.

    Yields:
        A list of `(layer, scores)` in the order of the calls; `scores` are `float32`, of
        shape `(batch, heads, queries, keys)`. What has no weights is not in it.

    Example:

    >>> import keras, numpy as np
    >>> from attention import MultiHeadAttention, ScoreScope
    >>> model = keras.Sequential([keras.Input((None, 8)), MultiHeadAttention(2)])
    >>> with ScoreScope() as found:
    ...     outputs = model(np.zeros((1, 3, 8)))
    >>> [(layer.num_heads, tuple(scores.shape)) for layer, scores in found]
    [(2, (1, 2, 3, 3))]
    """
    found: list[tuple[Any, Tensor]] = []
    with change_context(scores=found):
        yield found


def scores_wanted() -> bool:
    """Returns whether a call is in a `ScoreScope`, which wants its weights."""
    return context().scores is not None


def keep_scores(layer: Any, scores: Tensor) -> None:
    """Adds the weights of a layer's call to the `ScoreScope`, if there is one."""
    found = context().scores
    if found is not None:
        found.append((layer, scores))
