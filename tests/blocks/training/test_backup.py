"""A training that was stopped goes on as if it had not been."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

from blocks import BackupAndResume, CausalLM, Muon, PackedDocuments, Perplexity
from tests.helpers import EAGER, raises, run_script, to_numpy
from tests.models import byte_preprocessor, make_backbone

ROWS, EPOCHS = 10, 3


class Stop(Exception):
    pass


class Watch(keras.callbacks.Callback):
    """Notes the losses, and stops after a step."""

    def __init__(self, at=None):
        super().__init__()
        self.losses, self.at, self.epoch = {}, at, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.losses[self.epoch, batch] = logs["loss"], logs["perplexity"]

    def on_epoch_end(self, epoch, logs=None):
        self.losses[epoch, "end"] = logs["loss"], logs["perplexity"]
        self.stop_at((epoch, "end"))

    def on_train_batch_begin(self, batch, logs=None):
        self.stop_at((self.epoch, batch))

    def stop_at(self, place):
        if place == self.at:
            raise Stop


def tokens():
    found = np.random.default_rng(0).integers(1, 60, (ROWS, 6)).astype("int32")
    return {"token_ids": found, "padding_mask": np.ones_like(found)}, found


def in_memory():
    x, y = tokens()
    return {"x": x, "y": y, "batch_size": 2}


def dataset():
    data = tf.data.Dataset.from_tensor_slices(tokens())
    return {"x": data.shuffle(ROWS, seed=3).batch(2)}


class Batches(keras.utils.PyDataset):
    """Is shuffled by itself, too, after each epoch."""

    def __init__(self):
        super().__init__()
        self.random, self.order = np.random.default_rng(1), np.arange(ROWS)

    def __len__(self):
        return ROWS // 2

    def __getitem__(self, index):
        x, y = tokens()
        rows = self.order[2 * index : 2 * index + 2]
        return {name: value[rows] for name, value in x.items()}, y[rows]

    def on_epoch_end(self):
        self.random.shuffle(self.order)


def generator():
    rows, batches = np.random.default_rng(2), Batches()
    return {
        "x": (batches[i] for _ in range(EPOCHS) for i in rows.permutation(5)),
        "steps_per_epoch": 5,
    }


def loader():
    torch = pytest.importorskip("torch")
    x, y = tokens()
    rows = [({k: v[i] for k, v in x.items()}, y[i]) for i in range(ROWS)]
    order = torch.Generator().manual_seed(0)
    return {
        "x": torch.utils.data.DataLoader(rows, 2, shuffle=True, generator=order),
    }


def packed():
    documents = [row[: 2 + i % 5].tolist() for i, row in enumerate(tokens()[1])]
    return {"x": PackedDocuments(documents, sequence_length=6, batch_size=1)}


def texts():
    return {"x": [c * 5 for c in "abcdefghij"], "batch_size": 2}


DATA = {
    "in memory": in_memory,
    "validation": lambda: {**in_memory(), "validation_split": 0.2},
    "dataset": dataset,
    "few steps": lambda: {**dataset(), "steps_per_epoch": 3},
    "PyDataset": lambda: {"x": Batches()},
    "generator": generator,
    "loader": loader,
    "packed": packed,
    "texts": texts,
}


def make(seed, optimizer="adam", data=None, **kwargs):
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    options = {"dropout": 0.3, "num_layers": 1, **kwargs.pop("backbone", {})}
    preprocessor = None
    if data == "texts":
        preprocessor = byte_preprocessor(sequence_length=6)
        options["vocabulary_size"] = preprocessor.tokenizer.vocabulary_size()
    lm = CausalLM(make_backbone(**options), preprocessor)
    lm.compile(optimizer, weighted_metrics=[Perplexity()], **kwargs)
    return lm


def fit(lm, folder, data, at=None, **options):
    watch = Watch(at)
    backup = BackupAndResume(folder, **options)
    lm.fit(**DATA[data](), epochs=EPOCHS, callbacks=[backup, watch], verbose=0)
    return watch.losses


def check_resuming(tmp_path, data, at, save_freq, optimizer="adam", **kwargs):
    """Compares a training that is stopped with one that is not."""

    def model(seed):
        made = optimizer if isinstance(optimizer, str) else optimizer()
        return make(seed, made, data, **kwargs)

    whole = model(0)
    expected = fit(whole, tmp_path / "whole", data, save_freq=save_freq)
    stopped = model(0)
    with pytest.raises(Stop):
        fit(stopped, tmp_path / "stopped", data, at, save_freq=save_freq)
    # Nothing of it is left but the backup.
    resumed = model(0)
    for variable in resumed.variables:
        variable.assign(keras.ops.ones_like(variable.value))
    random.seed(5), np.random.seed(5), keras.random.normal((1,))
    found = fit(resumed, tmp_path / "stopped", data, save_freq=save_freq)
    assert set(found) <= set(expected)
    assert (EPOCHS - 1, "end") in found

    # Those before were passed over.
    order = list(expected)
    # Several steps have the number of the last one.
    first = at if at in order else (at[0], at[1] + 1)
    for place in order[order.index(first) :]:
        np.testing.assert_allclose(found[place], expected[place], rtol=1e-6)
    weights = zip(resumed.trainable_variables, whole.trainable_variables)
    for one, other in weights:
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), atol=1e-6)
    assert not list(tmp_path.rglob("training_state*"))
    return found, expected


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("data", "at", "save_freq"),
    [
        ("in memory", (1, 3), 2),
        slow("dataset", (2, 1), 3),
        slow("PyDataset", (2, 2), 2),
        slow("generator", (1, 2), 3),
        slow("validation", (1, "end"), 3),
        slow("few steps", (2, 1), 1),
        slow("in memory", (0, 0), "epoch"),
        slow("dataset", (2, 3), "epoch"),
        slow("loader", (2, 1), 2),
        slow("packed", (2, 1), 2),
        slow("texts", (1, 3), 2),
    ],
)
def test_data(data, at, save_freq, tmp_path):
    eager = EAGER and data != "in memory"
    check_resuming(tmp_path, data, at, save_freq, run_eagerly=eager)


def accumulating():
    return keras.optimizers.AdamW(
        0.01, gradient_accumulation_steps=2, use_ema=True, global_clipnorm=1.0
    )


def scheduled():
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 20)
    inner = keras.optimizers.SGD(schedule, momentum=0.9)
    return keras.optimizers.LossScaleOptimizer(inner)


def muon():
    # It knows weights by their paths.
    other = make_backbone(num_layers=1)
    return Muon(other, 0.01, gradient_accumulation_steps=2, use_ema=True)


@pytest.mark.parametrize(
    ("optimizer", "kwargs"),
    [
        slow(accumulating, {}),
        slow(scheduled, {}),
        slow("adam", {"backbone": {"dtype": "mixed_bfloat16"}}),
        slow("sgd", {"backbone": {"dtype": "bfloat16"}}),
        slow("muon", {}),
        slow(muon, {}),
    ],
)
def test_optimizers_and_dtypes(optimizer, kwargs, tmp_path):
    check_resuming(tmp_path, "in memory", (1, 4), 3, optimizer, **kwargs)


@pytest.mark.skipif(keras.config.backend() == "torch", reason="Keras has it not there")
@pytest.mark.slow
def test_several_steps_at_once(tmp_path):
    check_resuming(tmp_path, "few steps", (2, 2), 2, steps_per_execution=2)


@pytest.mark.slow
def test_a_step_without_compiling(tmp_path):
    check_resuming(tmp_path, "in memory", (1, 4), 3, run_eagerly=True)


def resume(folder, lm=None, data="in memory", **options):
    fit(lm or make(0, run_eagerly=EAGER), folder, data, **options)


def stop(folder, at=(1, 1), **options):
    with pytest.raises(Stop):
        fit(make(0, run_eagerly=EAGER), folder, "in memory", at, **options)


@pytest.mark.same_everywhere
def test_a_backup_of_another_training_is_refused(tmp_path):
    stop(tmp_path)
    with raises(ValueError, "of another model, optimizer or metrics", "momentum"):
        resume(tmp_path, make(0, keras.optimizers.SGD(0.1, momentum=0.9)))
    sizes = {"vocabulary_size": 70, "hidden_dim": 16}
    other = make(0, backbone=sizes, run_eagerly=EAGER)
    with raises(ValueError, "of another model", "(70, 16)"):
        resume(tmp_path, other)


@pytest.mark.same_everywhere
def test_data_that_are_fewer_than_before(tmp_path):
    stop(tmp_path, (1, 4), save_freq=4)
    lm, (x, y) = make(0, run_eagerly=EAGER), tokens()
    backup = BackupAndResume(tmp_path)
    data = keras.tree.map_structure(lambda array: array[:4], x), y[:4]
    with raises(ValueError, "`x` has fewer batches", "3 of epoch 2"):
        lm.fit(
            *data, batch_size=2, shuffle=False, epochs=3, callbacks=backup, verbose=0
        )
    # And the model trains on.
    lm.fit(*data, verbose=0)


@pytest.mark.slow
@pytest.mark.same_everywhere
def test_damage_and_places_that_can_not_be_written_to(tmp_path):
    stop(tmp_path)
    path = tmp_path / "training_state.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with raises(ValueError, f"The backup '{path}' is damaged"):
        resume(tmp_path)
    with raises(OSError, "training_state.npz"):
        resume(path)
    with raises(ValueError, "`save_freq`"):
        BackupAndResume(tmp_path, save_freq=0)
    two = [BackupAndResume(tmp_path) for _ in range(2)]
    x, y = tokens()
    with raises(ValueError, "one `BackupAndResume`"):
        make(0).fit(x, y, callbacks=two)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with raises(ValueError, "is for `CausalLM.fit`", "BackupAndRestore"):
        model.fit(np.ones((2, 2)), np.ones((2, 1)), callbacks=two[:1], verbose=0)


SCRIPT = """
    import json, sys
    from tests.blocks.training.test_backup import Watch, make, tokens
    from blocks import BackupAndResume
    lm, (x, y) = make(0, backbone={}), tokens()

    class Write(Watch):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            print(json.dumps([self.epoch, batch, *self.losses[self.epoch, batch]]), flush=True)

    backup = BackupAndResume(sys.argv[1], save_freq=3)
    lm.fit(x, y, batch_size=2, epochs=12, callbacks=[backup, Write()], verbose=0)
    print("done", flush=True)
"""


def run(folder, kill_after=None):
    """Runs the script; returns its losses and whether it ended."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder)]
    options = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        losses = {}
        for line in process.stdout:
            if line == "done\n":
                return losses, True
            epoch, batch, *values = json.loads(line)
            losses[epoch, batch] = values
            if len(losses) == kill_after:
                process.send_signal(signal.SIGKILL)
    assert kill_after is not None
    return losses, False


@pytest.mark.slow
def test_killed_in_its_process(tmp_path):
    expected, ended = run(tmp_path / "whole")
    assert ended
    folder, kill_after = tmp_path / "killed", 8
    for _ in range(8):
        found, ended = run(folder, kill_after)
        last = list(found)[-3:]
        for place in last:
            np.testing.assert_allclose(found[place], expected[place], rtol=1e-6)
        if ended:
            break
        kill_after += 9
    assert ended
    assert not list(tmp_path.rglob("training_state*"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="not on this system")
@pytest.mark.same_everywhere
@pytest.mark.slow
def test_a_full_disk_leaves_the_last_backup(tmp_path):
    stop(tmp_path)
    before = (tmp_path / "training_state.npz").read_bytes()
    limit = len(before) // 2
    script = f"""
        import resource, signal
        from tests.blocks.training.test_backup import resume
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
        try:
            resume({str(tmp_path)!r})
        except OSError as error:
            print(error)
    """
    done = run_script(script)
    assert "The backup can't be saved: File too large" in done.stdout, done.stderr
    assert [x.name for x in tmp_path.iterdir()] == ["training_state.npz"]
    assert (tmp_path / "training_state.npz").read_bytes() == before
