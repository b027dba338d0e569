"""Saving over a preset, and being killed, refused or damaged."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from blocks import CausalLM
from blocks.preset_files import check_files, finish_save, written_aside
from tests.helpers import raises, run_script, to_numpy
from tests.models import make_backbone, make_text_lm

pytestmark = pytest.mark.same_everywhere

SAVED = {"a.json": "old", "model.weights.h5": "old", "assets/b.txt": "old"}


def write(folder, files):
    for name, text in files.items():
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(folder):
    names = (x for x in pathlib.Path(folder).rglob("*") if x.is_file())
    return {x.relative_to(folder).as_posix(): x.read_text() for x in names}


def save(folder, files):
    with written_aside(folder) as aside:
        write(aside, files)


def without_sums(files):
    return {k: v for k, v in files.items() if k != "checksums.json"}


def test_files_of_a_save_replace_those_of_the_last_one(tmp_path):
    write(tmp_path, {"README.md": "mine"})
    save(tmp_path, SAVED)
    assert without_sums(read(tmp_path)) == {**SAVED, "README.md": "mine"}
    new = {"a.json": "new", "model.weights.json": "new", "model_0.weights.h5": "new"}
    save(tmp_path, new)
    # Weights in other files would be of another model.
    expected = {**new, "assets/b.txt": "old", "README.md": "mine"}
    assert without_sums(read(tmp_path)) == expected
    check_files(tmp_path)
    assert not [x for x in os.listdir(tmp_path) if x.startswith(".")]


def test_an_error_leaves_the_preset_as_it_was(tmp_path):
    save(tmp_path, SAVED)
    with raises(RuntimeError, "stop"), written_aside(tmp_path) as aside:
        write(aside, {"a.json": "half"})
        raise RuntimeError("stop")
    assert without_sums(read(tmp_path)) == SAVED
    check_files(tmp_path)


@pytest.mark.parametrize("stop", range(12))
def test_a_crash_leaves_one_save_or_the_other(tmp_path, stop, monkeypatch):
    """At each change of the file system; as far as one process can show it."""
    save(tmp_path, SAVED)
    new = dict.fromkeys(SAVED, "new")
    count = [0]

    class Crash(BaseException):
        pass

    def crashing(function):
        def call(*args, **kwargs):
            if count[0] >= stop:
                raise Crash
            count[0] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink"):
            patch.setattr(pathlib.Path, name, crashing(getattr(pathlib.Path, name)))
        patch.setattr("shutil.rmtree", crashing(lambda *args, **kwargs: None))
        patch.setattr(os, "fsync", crashing(os.fsync))
        with contextlib.suppress(Crash):
            save(tmp_path, new)
    finish_save(tmp_path)
    check_files(tmp_path)
    found = {k: v for k, v in read(tmp_path).items() if k in SAVED}
    assert found in (SAVED, new)
    # And the next one is as if nothing had been.
    save(tmp_path, new)
    assert without_sums(read(tmp_path)) == new


def test_damage_is_noticed(tmp_path):
    lm = make_text_lm()
    lm.save_to_preset(tmp_path)
    path = tmp_path / "model.weights.h5"
    content = bytearray(path.read_bytes())
    # In the numbers of a weight, which HDF5 does not check.
    middle = content.index(to_numpy(lm.backbone.layer_norm.gamma).tobytes())
    content[middle] ^= 1
    path.write_bytes(content)
    with raises(ValueError, "model.weights.h5 has changed", "checksums.json"):
        CausalLM.from_preset(tmp_path)
    assert CausalLM.from_preset(tmp_path, load_weights=False).backbone.built
    (tmp_path / "checksums.json").unlink()
    CausalLM.from_preset(tmp_path)
    lm.save_to_preset(tmp_path)
    path.unlink()
    with raises(ValueError, "model.weights.h5 is missing"):
        CausalLM.from_preset(tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="not on this system")
def test_without_room_the_preset_stays(tmp_path):
    """HDF5 would end the process, so it is another one."""
    backbone = make_backbone(num_layers=1, vocabulary_size=4000)
    backbone.save_to_preset(tmp_path)
    script = f"""
        import resource, signal
        from tests.models import make_backbone
        backbone = make_backbone(num_layers=1, vocabulary_size=4000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            backbone.save_to_preset({str(tmp_path)!r})
        except OSError as error:
            print(error)
    """
    run = run_script(script)
    assert "files may not be that large" in run.stdout, run.stderr[-2000:]
    check_files(tmp_path)
    assert not [x for x in os.listdir(tmp_path) if x.startswith(".")]


@pytest.mark.slow
def test_a_killed_save_leaves_a_preset(tmp_path):
    script = f"""
        from tests.models import make_backbone
        backbone = make_backbone(num_layers=2, vocabulary_size=20_000)
        for weight in backbone.weights:
            weight.assign(weight * 0 + 2.0)
        print("ready", flush=True)
        backbone.save_to_preset({str(tmp_path)!r})
    """
    # More moments by hand: `np.linspace(0.0, 0.3, 8)`.
    for delay in (0.02, 0.1, 0.2):
        make_backbone(num_layers=2, vocabulary_size=20_000).save_to_preset(tmp_path)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        finish_save(tmp_path)
        check_files(tmp_path)
