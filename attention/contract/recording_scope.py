"""The rehearsal of a cached call: which cached layers are called, and how."""

from __future__ import annotations

from typing import Any

from keras import ops, tree

from attention.contract.context import context
from attention.contract.scopes import OR_NO_CACHE, Scope, first_size
from attention.contract.sizes import is_concrete


class RecordingScope(Scope):
    """Notes which cached layers are called, in call order, and runs them plain.

    It is the rehearsal for the scopes above, and refuses what could not be
    right with a cache: a layer that is called inside of a mapped function, from
    which no cache can come out, on other rows than the model, or past its
    `__call__`.

    Args:
        batch_size: int or `None`. The number of rows, where it is known.
        strict: bool. Whether to raise an error at once. If not, nothing is
            changed about the calls, and `problem` says what was found.

    Attributes:
        layers: the cached layers in call order.
        problem: `None`, or why the calls could have no cache.
        whole_prompt: bool. Whether some call, at whatever depth, needs a whole
            prompt at once (see `CachedLayer.whole_prompt_arguments`).

    Raises:
        ValueError: at the call that could have no cache.
    """

    def __init__(self, batch_size: int | None = None, strict: bool = True) -> None:
        super().__init__(dry_run=context().dry_run or self)
        self.layers: list[Any] = []
        self.problem: str | None = None
        self.whole_prompt = False
        self._strict = strict
        self._batch_size = batch_size
        self._eager = False

    def __enter__(self) -> Any:
        # Calls that are not a rehearsal may be traced, by `jax.grad` for instance.
        self._eager = self._strict and is_concrete(ops.zeros(()))
        return super().__enter__()

    def run(self, layer: Any, call: Any, inputs: Any) -> Any:
        name = f"Layer '{layer.name}' ({type(layer).__name__})"
        rows = first_size(inputs)
        if None not in (rows, self._batch_size) and rows != self._batch_size:
            self.refuse(
                f"{name} is called on {rows} rows, where the model has "
                f"{self._batch_size}. A cache holds one sequence for each row of "
                "the model, so a layer can't have one where another axis is "
                "folded into the batch, or the rows are split. Call it on the "
                "model's own rows" + OR_NO_CACHE
            )
        self.layers.append(layer)
        outputs = call(None, None)
        first = next(iter(tree.flatten(outputs)), None)
        if self._eager and first is not None and not is_concrete(first):
            self.refuse(
                f"{name} is called inside of a function that is traced on its own: "
                "mapped (`vectorized_map`), looped (`scan`, `fori_loop`, an RNN) or "
                "compiled. What it is to remember can't leave that function, so it "
                "can't have a cache. Call it outside, on all steps at once, or in a "
                "Python loop" + OR_NO_CACHE
            )
        return outputs

    def refuse(self, message: str) -> None:
        self.problem = self.problem or message
        if self._strict:
            raise ValueError(message)
