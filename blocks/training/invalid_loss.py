"""Stops training without a finite loss, before anything is saved."""

from __future__ import annotations

import math
import threading
from typing import Any

import keras
from keras import ops

_HELP = (
    "Go on from the last checkpoint with a smaller learning rate, a warm-up, or clipped "
    "gradients (`global_clipnorm=1.0` of the optimizer)."
)


class StopOnInvalidLoss(keras.callbacks.Callback):
    """Raises a `FloatingPointError` that names the step whose loss is not finite.

    `CausalLM.fit` puts it before all other callbacks, so that none of them saves what
    such a step made of the weights. It reads what Keras has read for the others. An epoch
    without a step, whose loss Keras says is 0, is a `ValueError`.
    """

    # Keras runs callbacks beside the training, where all of them say that they may be:
    # on several threads, and so the steps in any order.
    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self._one_at_a_time = threading.Lock()
        self._epoch, self._next, self._at_once = 0, 0, 1
        self._is_empty = True
        self._waiting: dict[int, float] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        self._at_once = self.model.steps_per_execution

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._next = epoch + 1, self._at_once - 1
        self._waiting.clear()
        self._is_empty = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        with self._one_at_a_time:
            self._is_empty = False
            self._waiting[batch] = (logs or {}).get("loss", 0.0)
            while self._next in self._waiting:
                self._check(self._next, self._waiting.pop(self._next))
                self._next += self._at_once

    def _check(self, batch: int, loss: float) -> None:
        # The mean over the epoch is finite as long as each of its losses is.
        if math.isfinite(loss):
            return
        first, last = batch - self._at_once + 2, batch + 1
        place = f"step {last}"
        if first < last:
            place = f"one of the steps {first} to {last}"
        raise FloatingPointError(
            f"The loss is {loss} at {place} of epoch {self._epoch}. {_HELP}"
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._is_empty:
            raise ValueError(
                f"`x` has no batch in epoch {epoch + 1}. If it can be read only once, it "
                "has too few for so many epochs."
            )
        # A finite loss may have gradients that are not, which shows in the next one only:
        # too late for what is saved at the end of an epoch.
        for weight in self.model.trainable_variables:
            if not bool(ops.all(ops.isfinite(weight.value))):
                raise FloatingPointError(
                    f"The weight '{weight.path}' is not finite at the end of epoch "
                    f"{epoch + 1}. {_HELP}"
                )
