"""The callbacks of `fit`: which there are always, and which comes first."""

from __future__ import annotations

from typing import Any

import keras
from keras import tree

from blocks.training.backup import BackupAndResume
from blocks.training.invalid_loss import StopOnInvalidLoss


def training_callbacks(given: Any) -> tuple[Any, BackupAndResume | None]:
    """Returns the callbacks of a training, and the one of them that makes backups.

    A `keras.callbacks.CallbackList` is returned as it is.
    """
    if isinstance(given, keras.callbacks.CallbackList):
        return given, None
    callbacks = tree.flatten(given) if given else []
    backups = [x for x in callbacks if isinstance(x, BackupAndResume)]
    if len(backups) > 1:
        raise ValueError(
            f"`callbacks` may have one `BackupAndResume`. It has {len(backups)}"
        )
    # It saves what others have changed, such as the learning rate.
    callbacks = [x for x in callbacks if x not in backups] + backups
    # Who wants Keras's own, which only ends the training, has it.
    if not any(isinstance(x, keras.callbacks.TerminateOnNaN) for x in callbacks):
        callbacks = [StopOnInvalidLoss(), *callbacks]
    return callbacks, next(iter(backups), None)
