"""Backups of a training from which it goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import zipfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from attention.contract import check_positive_int

_FILE = "training_state.npz"


class BackupAndResume(keras.callbacks.Callback):
    """Saves all of a training's state, and goes on from there in a new process.

    Run the same script again after a crash, and it has the losses that it would have
    had: `keras.callbacks.BackupAndRestore` loads weights and optimizer and begins the
    epoch again, and in another order. This one also restores the position in the data,
    the order of samples in memory, the seeds of dropout, and the metrics of the epoch.
    Batches of the epoch that had been learned are read, and passed over.

    It is for `CausalLM.fit` and `PreferenceTuning.fit`. The file is written aside and
    renamed: a crash while it is written, or a full disk, leaves the last one.

    It relies on data that come in the same order when the script runs again: a
    `tf.data.Dataset` that shuffles needs a seed, a torch `DataLoader` that shuffles a
    `generator` of its own with a seed. The state of other callbacks, such as what
    `EarlyStopping` has counted, is not in it.

    Args:
        backup_dir: str or path. The folder of the backup, of this training only.
        save_freq: `"epoch"`, or int: after how many batches it is saved.
        delete_checkpoint: bool. Whether the backup is removed when the training ends.

    Raises:
        OSError: by `fit`, if the folder can't be written to. What it holds stays.
        ValueError: if `save_freq` is neither; by `fit`, if the backup is damaged or of
            another model.

    Example:

    >>> import os, tempfile
    >>> import numpy as np
    >>> from blocks import BackupAndResume, CausalLM, CustomBackbone
    >>> sizes = dict(num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32)
    >>> lm = CausalLM(CustomBackbone(50, **sizes, max_sequence_length=8))
    >>> lm.compile(optimizer="adam")
    >>> tokens = np.arange(1, 9, dtype="int32")[None]
    >>> x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    >>> folder = tempfile.mkdtemp()
    >>> backup = BackupAndResume(folder, save_freq=100, delete_checkpoint=False)
    >>> _ = lm.fit(x, tokens, epochs=2, callbacks=[backup], verbose=0)
    >>> os.listdir(folder)
    ['training_state.npz']
    """

    def __init__(
        self,
        backup_dir: Any,
        save_freq: str | int = "epoch",
        delete_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        if save_freq != "epoch":
            save_freq = check_positive_int("save_freq", save_freq)
        self.backup_dir = pathlib.Path(backup_dir)
        self.save_freq = save_freq
        self.delete_checkpoint = delete_checkpoint
        # Keras need not wait for it after each batch.
        self.async_safe = save_freq == "epoch"
        self._started, self._left = False, 0

    def start(self, initial_epoch: int) -> tuple[int, int]:
        """Reads the backup, if there is one; `fit` calls it before it reads data.

        Returns:
            The epoch to begin with, and the seed of the order of samples.
        """
        path = self.backup_dir / _FILE
        # The state and the arrays of the file, as long as they are needed.
        self._restored: tuple[dict[str, Any], dict[str, np.ndarray]] | None = None
        self._epoch, self._batch, self._seed = initial_epoch, 0, random.getrandbits(31)
        if path.exists():
            try:
                with np.load(path) as file:
                    arrays = {name: file[name] for name in file.files}
                state = json.loads(str(arrays["state"]))
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"The backup '{path}' is damaged. Delete it to train from the start."
                ) from error
            self._epoch, self._batch = state["epoch"], state["batch"]
            self._seed, self._restored = state["seed"], (state, arrays)
        self._started = True
        return self._epoch, self._seed

    def on_train_begin(self, logs: Any = None) -> None:
        if not self._started:
            raise ValueError(
                "`BackupAndResume` is for `CausalLM.fit` and `PreferenceTuning.fit`, in "
                "a list of callbacks: these read the data from where the backup was "
                "made. Elsewhere use `keras.callbacks.BackupAndRestore`."
            )
        self._started, self._since = False, 0
        if not self.model.optimizer.built:
            strategy = getattr(self.model, "distribute_strategy", None)
            with strategy.scope() if strategy else contextlib.nullcontext():
                self.model.optimizer.build(self.model.trainable_variables)
        if self._restored is not None:
            self._restore(*self._restored)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._host = epoch, _host_state()
        if not self._batch:
            self._torch = _torch_state()
        # How many batches of this epoch were learned before; of later ones, none.
        self._learned, self._batch = self._batch, 0
        if self._learned and self._restored is not None:
            self._pass_over(self._learned, *self._restored)
            return
        self._restored = None
        if not (self.backup_dir / _FILE).exists():
            # If that can't be done, it is said now. What begins without it is random.
            self._save(epoch, 0)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 0:
            # Iterators of data have drawn numbers, of which there are not always as many.
            _set_torch_state(self._torch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.save_freq == "epoch" or batch < self._learned:
            return
        self._since += self.model.steps_per_execution
        if self._since >= int(self.save_freq):
            self._save(self._epoch, batch + 1)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._left > 0:
            self._stop_passing_over()
            raise ValueError(
                f"`x` has fewer batches than when the backup in '{self.backup_dir}' was "
                f"made: {self._learned} of epoch {epoch + 1} had been learned."
            )
        if self.save_freq == "epoch":
            self._host = _host_state()
            self._save(epoch + 1, 0)

    def on_train_end(self, logs: Any = None) -> None:
        if self.delete_checkpoint:
            (self.backup_dir / _FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.backup_dir.rmdir()  # unless there is something else in it

    def _save(self, epoch: int, batch: int) -> None:
        self._since = 0
        state = {"epoch": epoch, "batch": batch, "seed": self._seed, "host": self._host}
        arrays: dict[str, Any] = {}
        for kind, variables_of in _KINDS.items():
            variables = variables_of(self.model)
            state[kind] = [x.name for x in variables]
            arrays |= {f"{kind}_{i}": _exact(x) for i, x in enumerate(variables)}
        arrays["state"] = np.array(json.dumps(state))
        arrays |= {f"torch_{i}": x for i, x in enumerate(_torch_state())}
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        path = self.backup_dir / _FILE
        aside = path.with_suffix(".writing")
        try:
            with open(aside, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The backup can't be saved: {error.strerror}. The last one is unchanged",
                str(self.backup_dir),
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    def _restore(self, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Restores all but the metrics, which Keras is yet to reset."""
        self._assign("variable", state, arrays)
        self._torch = [arrays[x] for x in arrays if x.startswith("torch_")]
        _set_host_state(state["host"])
        _set_torch_state(self._torch)

    def _assign(
        self, kind: str, state: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> None:
        variables, names = _KINDS[kind](self.model), state[kind]
        saved = [arrays[f"{kind}_{i}"] for i in range(len(names))]
        known = [(x.name, tuple(x.shape)) for x in variables]
        found = [(x, y.shape) for x, y in zip(names, saved)]
        if known != found:
            first = next((x for x in zip(known, found) if x[0] != x[1]), None)
            difference = (
                f"{len(known)} variables, and the backup {len(found)}"
                if first is None
                else "{} {}, and the backup {} {}".format(*first[0], *first[1])
            )
            raise ValueError(
                f"The backup in '{self.backup_dir}' is of another model, optimizer or "
                f"metrics: this one has {difference}. Use another folder, or delete it."
            )
        for variable, array in zip(variables, saved):
            variable.assign(array)

    def _pass_over(
        self, count: int, state: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> None:
        """Makes the model read so many batches of this epoch without learning them."""
        model = self.model
        self._left, self._train = count, model.train_function
        is_built = len(_metrics_variables(model)) == len(state["metric"])
        if is_built:
            self._assign("metric", state, arrays)
        logs = model.get_metrics_result() if is_built else {}

        def read(*arguments: Any) -> Any:
            nonlocal is_built, logs
            *states, data = arguments
            if not is_built:
                # On TensorFlow the first step makes the variables of metrics.
                self._train(data)
                self._restore(state, arrays)
                self._assign("metric", state, arrays)
                is_built, logs = True, model.get_metrics_result()
            # What is read ahead is in a list, already.
            elif isinstance(data, Iterator):
                for _ in range(model.steps_per_execution):
                    next(data)
            self._left -= model.steps_per_execution
            if self._left <= 0:
                self._stop_passing_over()
                # Reading may have drawn numbers.
                _set_torch_state(self._torch)
            return (logs, *states) if states else logs

        model.train_function = read

    def _stop_passing_over(self) -> None:
        self._left, self._restored = 0, None
        self.model.train_function = self._train


def _variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables of a training without those of its metrics."""
    others = {id(x) for x in _metrics_variables(model)}
    return [
        x for x in (*model.variables, *model.optimizer.variables) if id(x) not in others
    ]


def _metrics_variables(model: keras.Model) -> list[keras.Variable]:
    return [x for metric in model.metrics for x in metric.variables]


# What a backup holds, each kind of variables under its own names.
_KINDS = {"variable": _variables, "metric": _metrics_variables}


def _exact(variable: keras.Variable) -> np.ndarray:
    # With replicas it is several variables.
    array = ops.convert_to_numpy(ops.copy(variable.value))
    # Files of NumPy have no bfloat16, nor others that float32 holds exactly.
    return array if array.dtype.kind in "biuf" else array.astype("float32")


def _host_state() -> list[Any]:
    """Returns the state of the random numbers with which data may be shuffled."""
    kind, *others = np.random.get_state()
    others[0] = np.asarray(others[0]).tolist()
    return [random.getstate(), [kind, *others]]


def _set_host_state(state: list[Any]) -> None:
    (version, keys, gauss), of_numpy = state
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(of_numpy))


def _torch_state() -> list[np.ndarray]:
    """Returns the state of the random numbers of torch: a layer without a seed has these."""
    if keras.config.backend() != "torch":
        return []
    import torch

    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return [x.numpy() for x in states]


def _set_torch_state(states: list[np.ndarray]) -> None:
    if states:
        import torch

        torch.set_rng_state(torch.from_numpy(states[0]))
        torch.cuda.set_rng_state_all([torch.from_numpy(x) for x in states[1:]])
