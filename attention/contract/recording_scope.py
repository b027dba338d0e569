"""The dry run of a cached call, which finds the cached layers it calls."""

from __future__ import annotations

from typing import Any

from keras import ops, tree

from attention.contract.context import context
from attention.contract.scopes import OR_NO_CACHE, Scope, first_size
from attention.contract.sizes import is_concrete


class RecordingScope(Scope):
    """Records the cached layers that are called, and runs them without a cache.

    It is the dry run for the other scopes, and refuses calls that can have no cache: in
    a mapped function, which no cache can leave, on other rows than the model's, or past
    the layer's `__call__`. If it is `strict`, such a call raises a `ValueError`.

    Attributes:
        layers: the cached layers in call order.
        problem: `None`, or why the calls can have no cache.
        whole_prompt: bool. Whether some call, at whatever depth, needs a whole
            prompt at once (see `CachedLayer.whole_prompt_arguments`).
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
        # Calls that are not a dry run may be traced, by `jax.grad` for instance.
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
                "compiled. Its cache can't leave that function, so it can't have one. "
                "Call it outside, on all steps at once, or in a Python loop"
                + OR_NO_CACHE
            )
        return outputs

    def refuse(self, message: str) -> None:
        self.problem = self.problem or message
        if self._strict:
            raise ValueError(message)
