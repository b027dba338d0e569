"""The loss of a language model without the logits of all its tokens in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from attention.contract import Tensor
from blocks.training.gradients import loop, value_and_gradients

# At least so many logits are in memory at a time.
_LOGITS = 2**24
# And as many as this times the numbers in the head, whose gradients are summed anew for
# each chunk: with small ones that takes longer than their products.
_HEADS = 1
# Taken for the batch size where it is not known yet when the step is traced.
_ROWS = 8


class UsedVariables(keras.StatelessScope):
    """Finds the variables whose values are read within it."""

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        super().__init__(state_mapping=[(x, x.value) for x in variables])
        self._used: dict[int, keras.Variable] = {}

    def get_current_value(self, variable: keras.Variable) -> Tensor:
        self._used[id(variable)] = variable
        return super().get_current_value(variable)

    def find(self) -> list[keras.Variable]:
        """Returns them in the order in which they were read first."""
        return list(self._used.values())


def chunked_sums(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    sizes: tuple[int, int],
    variables: Sequence[keras.Variable],
    hidden_states: Tensor,
    targets: Tensor,
    weights: Tensor,
    training: bool,
) -> Tensor:
    """Sums the scores of all tokens, from the logits of a few positions at a time.

    In training the gradients are computed with the sums, a few positions at a time,
    too: so logits are computed once, and never kept.

    Args:
        score: function of hidden states, targets and weights of some positions, which
            computes logits and returns a vector of sums.
        sizes: how many sums these are, and the number of logits of a token.
        variables: the variables that `score` uses.
        hidden_states: tensor of shape `(batch, length, hidden_dim)`.
        targets: integer tensor of shape `(batch, length)`.
        weights: float tensor of shape `(batch, length)`.
        training: bool. Whether the first sum is to have gradients.

    Returns:
        What `score` returns for all positions.

    Reference:

    - [Hsu et al., 2024](https://arxiv.org/abs/2410.10989)
    """
    trained = [x for x in variables if x.trainable]
    fixed = [(x, ops.stop_gradient(x.value)) for x in variables if not x.trainable]
    rows, length = hidden_states.shape[:2]
    logits = max(_LOGITS, _HEADS * hidden_states.shape[2] * sizes[1])
    chunk = max(1, logits // (sizes[1] * (rows or _ROWS)))
    length = ops.shape(hidden_states)[1] if length is None else length
    if isinstance(length, int):
        chunk = min(chunk, length)
    count = -(-length // chunk)

    def compute(hidden_states: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sums, and the gradients, if there are any."""
        extra = count * chunk - length
        inputs = [_lengthened(x, extra) for x in (hidden_states, targets, weights)]

        def add(i: Any, state: list[Tensor]) -> list[Tensor]:
            hidden, goals, shares = (_positions(x, i * chunk, chunk) for x in inputs)

            def score_chunk(hidden: Tensor, *values: Tensor) -> Tensor:
                mapping = [*fixed, *zip(trained, values)]
                with keras.StatelessScope(state_mapping=mapping):
                    return score(hidden, goals, shares)

            if not training:
                return [state[0] + score_chunk(hidden, *values)]
            sums, gradients = value_and_gradients(score_chunk, [hidden, *values])
            return [
                state[0] + sums,
                ops.slice_update(state[1], (0, i * chunk, 0), gradients[0]),
                *(x + y for x, y in zip(state[2:], gradients[1:])),
            ]

        start = [ops.zeros(sizes[0]), inputs[0], *values] if training else [0]
        state = loop(count, add, [ops.zeros(sizes[0]), *map(ops.zeros_like, start[1:])])
        if training:
            state[1] = state[1][:, :length]
        return state

    values = [ops.convert_to_tensor(x.value) for x in trained]
    if not training:
        return compute(hidden_states, values)[0]

    @ops.custom_gradient
    def with_gradients(hidden_states: Tensor, *values: Tensor) -> Any:
        sums, *gradients = compute(hidden_states, values)

        def scale(*arguments: Tensor, upstream: Any = None) -> Any:
            # Backends call it with other arguments.
            factor = (arguments[0] if upstream is None else upstream)[0]
            return tuple(
                ops.cast(ops.cast(x, "float32") * factor, x.dtype) for x in gradients
            )

        return sums, scale

    return with_gradients(hidden_states, *values)


def _lengthened(x: Tensor, extra: Any) -> Tensor:
    """Returns a tensor with so many zeros more on axis 1."""
    if isinstance(extra, int) and extra == 0:
        return x
    shape = ops.shape(x)
    zeros = ops.zeros((shape[0], extra, *shape[2:]), dtype=x.dtype)
    return ops.concatenate([x, zeros], axis=1)


def _positions(x: Tensor, start: Any, count: int) -> Tensor:
    shape = ops.shape(x)
    return ops.slice(x, (0, start, 0)[: len(shape)], (shape[0], count, *shape[2:]))
