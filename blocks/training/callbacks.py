"""The callbacks of `fit`: which there are always, and which comes first."""

from __future__ import annotations

from typing import Any

import keras
from keras import tree

from blocks.training.backup import BackupAndResume
from blocks.training.invalid_loss import StopOnInvalidLoss
from blocks.training.optimizer_precision import check_optimizer
from blocks.training.tokens_per_second import TokensPerSecond


def start_training(
    model: keras.Model, options: dict[str, Any]
) -> tuple[int | None, int | None]:
    """Checks the optimizer, completes the callbacks of `fit`, and looks for a backup.

    The callbacks and the first epoch are changed in `options`, the arguments of `fit`. A
    `keras.callbacks.CallbackList` stays as it is.

    Returns:
        How many epochs an earlier process has trained, and the seed of the order of
        samples; `None` without a `BackupAndResume`.
    """
    check_optimizer(getattr(model, "optimizer", None), model.trainable_variables)
    given = options.get("callbacks")
    if isinstance(given, keras.callbacks.CallbackList):
        return None, None
    callbacks = tree.flatten(given) if given else []
    backups = [x for x in callbacks if isinstance(x, BackupAndResume)]
    if len(backups) > 1:
        raise ValueError(
            f"`callbacks` may have one `BackupAndResume`. It has {len(backups)}"
        )
    # It saves what others have changed, such as the learning rate.
    callbacks = [x for x in callbacks if x not in backups] + backups
    callbacks = [TokensPerSecond(), *callbacks]
    # Who wants Keras's own, which only ends the training, has it.
    if not any(isinstance(x, keras.callbacks.TerminateOnNaN) for x in callbacks):
        callbacks = [StopOnInvalidLoss(), *callbacks]
    options["callbacks"] = callbacks
    if not backups:
        return None, None
    first = options.get("initial_epoch", 0)
    options["initial_epoch"], seed = backups[0].start(first)
    return options["initial_epoch"] - first, seed
