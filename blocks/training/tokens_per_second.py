"""How many tokens a second `fit` trains on, beside the loss."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import keras
from keras import ops

from attention.contract import Tensor

NAME = "tokens_per_second"


class MeanLoss(keras.metrics.Mean):
    """The mean loss of an epoch, which also counts the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__(name="loss")
        self.tokens = self.add_variable((), "zeros", "float32", name="tokens")

    def count_tokens(self, count: Tensor) -> None:
        self.tokens.assign_add(count)

    def reset_state(self) -> None:
        super().reset_state()
        self.tokens.assign(0.0)


class TokensPerSecond(keras.callbacks.Callback):
    """Adds `tokens_per_second` to what Keras shows of each step and epoch.

    It is the mean of the epoch so far: how many tokens that are no padding its steps
    have trained on, by the time from the end of one step to that of another. The first
    step of a `fit`, which compiles, is left out; so an epoch of this one step has NaN.

    `CausalLM.fit` puts it before the callbacks of the caller, which find the number in
    their `logs`. The count is a part of the training step, and is read when Keras has
    waited for the loss of the same step.
    """

    # Keras then runs it beside the training: on several threads, so in any order.
    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self._one_at_a_time = threading.Lock()
        self._step, self._at_once = 0, 1
        self._counts: dict[int, Tensor] = {}
        # Tokens of this epoch and the time: from where it is measured, and the latest.
        self._start: tuple[float, float] | None = None
        self._latest: tuple[float, float] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._at_once, self._start = self.model.steps_per_execution, None
        self.model.on_count = self.keep

    def on_train_end(self, logs: Any = None) -> None:
        self.model.on_count = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._counts.clear()
        if self._latest is not None:
            self._start = (0.0, perf_counter())
        self._latest = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Never beside the training, as only the ends of batches are.
        self._step = batch // self._at_once

    def keep(self, count: Tensor) -> None:
        """Keeps the count of the step that is running, without waiting for it."""
        self._counts[self._step] = count

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        count = self._counts.pop(batch // self._at_once, None)
        if count is None:
            return
        now = float(ops.convert_to_numpy(count)), perf_counter()
        with self._one_at_a_time:
            self._start = self._start or now
            self._latest = max(self._latest or now, now)
        if logs is not None and now > self._start:
            logs[NAME] = self._rate(now)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None and self._latest is not None:
            logs[NAME] = self._rate(self._latest)

    def _rate(self, now: tuple[float, float]) -> float:
        tokens, seconds = (x - y for x, y in zip(now, self._start or now))
        return tokens / seconds if seconds else math.nan


def add_count(outputs: Any, loss: MeanLoss, model: Any) -> None:
    """Adds the count to the logs among the outputs of a training step."""
    if isinstance(outputs, tuple):
        # On JAX values are in the state of the step, the metrics' in its last part.
        logs, (*_, values) = outputs
        places = [x is loss.tokens for x in model.metrics_variables]
        count = values[places.index(True)]
    else:
        logs, count = outputs, loss.tokens.value
    logs[NAME] = ops.copy(count)


def hand_over_counts(function: Callable, model: Any) -> Callable:
    """Wraps a training function so that Keras's logs are without the count.

    Keras takes logs with other names than the metrics' for those of the last step
    alone. The count goes to `model.on_count`, if there is one.
    """

    def run(*args: Any) -> Any:
        outputs = function(*args)
        # With the new state, on JAX.
        logs = outputs[0] if isinstance(outputs, tuple) else outputs
        count = logs.pop(NAME, None)
        if count is not None and model.on_count is not None:
            model.on_count(count)
        return outputs

    return run
