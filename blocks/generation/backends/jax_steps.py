"""Compiling a step of generation on JAX."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import keras


class JaxStep:
    """A step compiled by `jax.jit`, which takes the model's variables as arguments.

    Variables that a function reads by itself become constants of the compiled code:
    new weights would have no effect, and each compiled step would hold a copy of them.
    The sampler's `variables` may be assigned, too. `donate` is the positions of arguments
    whose memory may be reused. Without it, a call copies the KV cache: see the rows
    `decode` of the benchmark.
    """

    def __init__(
        self,
        function: Callable,
        task: Any,
        variables: list[keras.Variable],
        donate: tuple[int, ...],
    ) -> None:
        self._variables = variables
        self._weights = [*task.trainable_variables, *task.non_trainable_variables]

        def stateless(values: Any, *args: Any) -> Any:
            read = itertools.chain(self._variables, self._weights)
            mapping = zip(read, itertools.chain(*values))
            with keras.StatelessScope(state_mapping=mapping) as scope:
                outputs = function(*args)
            current = [scope.get_current_value(v) for v in self._variables]
            pairs = zip(current, values[0])
            return outputs, [old if new is None else new for new, old in pairs]

        self.jitted = jax.jit(stateless, donate_argnums=tuple(i + 1 for i in donate))

    def values(self) -> tuple[list[Any], list[Any]]:
        """Returns the first argument of `jitted`: the variables' values."""
        return [v.value for v in self._variables], [v.value for v in self._weights]

    def __call__(self, *args: Any) -> Any:
        outputs, updated = self.jitted(self.values(), *args)
        # Generation changes no variable but the sampler's.
        for variable, value in zip(self._variables, updated):
            variable.assign(value)
        return outputs
