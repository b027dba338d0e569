"""What `python -m benchmarks.generate` and `python -m benchmarks.train` share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cases import Plan
from benchmarks.processes import ROOT, WorkerError
from benchmarks.report import table
from benchmarks.runner import Runner

BACKENDS = ("tensorflow", "jax", "torch")
PACKAGES = ("keras", "keras-hub", "tensorflow", "jax", "torch", "transformers")
# Environment variables that change the results; the report names those that are set.
VARIABLES = ("XLA_FLAGS", "TF_XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A command that measures all contestants and prints a report.

    Attributes:
        name: the module of the command, and of its JSON file.
        title: of the report.
        method: what all contestants do, in a few words.
        make_plan: function of `quick` and `device`, which returns what to run.
        runner: what runs the cases of a model.
        backends: those that are measured by default.
        quick: what `--quick` runs.
    """

    name: str
    title: str
    method: str
    make_plan: Callable[[bool, str], Plan]
    runner: type[Runner]
    backends: tuple[str, ...]
    quick: str

    def table(self, report: dict[str, Any]) -> str:
        """Returns a report as Markdown."""
        return table(report, self.title, self.method)

    def run(
        self,
        plan: Plan,
        contestants: list[str],
        rounds: int,
        device: str = "cpu",
        quick: bool = False,
        only: Sequence[str] = (),
        budget: float = 300.0,
        write: Callable[[dict[str, Any]], None] = lambda report: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> dict[str, Any]:
        """Runs a plan.

        Args:
            plan: the models and cases.
            contestants: their names; replies are compared with the first one's.
            rounds: how many times each contestant is timed in each case.
            device: `"cpu"` or `"gpu"`.
            quick: whether the report says that it is a quick one.
            only: parts of the names of the cases to run, such as "batch 1", "Llama" or
                "Llama-shaped 135M: batch 1"; empty means all.
            budget: see `Runner`.
            write: called with the report before the first case and after each case, so
                that an interrupted run keeps its results.
            say: called with messages of progress.

        Returns:
            The report.
        """
        begin = time.monotonic()
        report: dict[str, Any] = {
            "settings": {
                "quick": quick,
                "device": device,
                "rounds": rounds,
                "dtype": plan.dtype,
                "contestants": contestants,
            },
            "machine": describe_machine(device),
            "rows": [],
            "minutes": 0.0,
            "finished": False,
        }
        # If the report can't be written, it fails before hours of work.
        write(report)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for shape in plan.models:
                cases = [
                    case
                    for case in plan.cases[shape.name]
                    if not only or any(x in f"{shape.name}: {case.name}" for x in only)
                ]
                if not cases:
                    continue
                path = pathlib.Path(folder)
                runner = self.runner(
                    plan, shape, contestants, rounds, device, path, budget
                )
                try:
                    for case in cases:
                        say(f"{shape.name}: {case.name}")
                        try:
                            rows = runner.run(case)
                            report["rows"] += [row.fields for row in rows]
                        except WorkerError as error:
                            say(f"  {error}")
                        report["minutes"] = (time.monotonic() - begin) / 60
                        write(report)
                finally:
                    runner.pool.close()
        report["finished"] = True
        write(report)
        return report

    def parse_arguments(self, arguments: list[str] | None) -> argparse.Namespace:
        """Parses the command line."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{self.name}",
            description=f"{self.title} compared with KerasHub and transformers.",
        )
        add, results = parser.add_argument, ROOT / "benchmarks" / "results"
        add("--quick", action="store_true", help=self.quick)
        add("--device", choices=("cpu", "gpu"), default="cpu")
        add("--backend", action="append", choices=BACKENDS, help="may be repeated")
        add(
            "--only",
            action="append",
            default=[],
            metavar="CASE",
            help="cases with this in 'MODEL: CASE', as it is reported; may be repeated",
        )
        add("--without", action="append", default=[], metavar="CONTESTANT")
        add("--rounds", type=int, help="default: 5, quick: 3")
        add(
            "--budget",
            type=float,
            default=300.0,
            help="seconds after which a contestant skips the remaining rounds of a case "
            "(default: %(default)g)",
        )
        add("--json", type=pathlib.Path, default=results / f"{self.name}.json")
        add(
            "--merge",
            action="store_true",
            help="keep the cases of an earlier run in the JSON file that are not run now",
        )
        add("--table", type=pathlib.Path, metavar="JSON", help="print a report again")
        return parser.parse_args(arguments)

    def main(self, arguments: list[str] | None = None) -> None:
        """Runs the command."""
        options = self.parse_arguments(arguments)
        if options.table is not None:
            print(self.table(json.loads(options.table.read_text(encoding="utf-8"))))
            return

        earlier = None
        if options.merge and options.json.exists():
            earlier = json.loads(options.json.read_text(encoding="utf-8"))

        def write(report: dict[str, Any]) -> None:
            found = report if earlier is None else merge(earlier, report)
            if not report["rows"]:
                return
            options.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(found, indent=1, ensure_ascii=False)
            options.json.write_text(text + "\n", encoding="utf-8")

        def say(text: str) -> None:
            seconds = time.monotonic() - begin
            print(f"[{seconds:6.0f} s] {text}", file=sys.stderr, flush=True)

        begin = time.monotonic()
        contestants = all_contestants(options.backend or self.backends)
        report = self.run(
            self.make_plan(options.quick, options.device),
            [name for name in contestants if name not in options.without],
            options.rounds or (3 if options.quick else 5),
            device=options.device,
            quick=options.quick,
            only=options.only,
            budget=options.budget,
            write=write,
            say=say,
        )
        print(self.table(report if earlier is None else merge(earlier, report)))
        say(f"written to {options.json}")


def all_contestants(backends: Sequence[str]) -> list[str]:
    """Returns the names of the contestants, ours first."""
    ours = [f"ours/{backend}" for backend in backends]
    theirs = []
    for backend in backends:
        theirs.append(f"keras_hub/{backend}")
        if backend == "tensorflow":
            theirs.append("keras_hub/tensorflow-xla")
    return [*ours, *theirs, "transformers/torch"]


def read_proc(path: str, key: str) -> str:
    """Returns a value from a file in `/proc`, or an empty string without one."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        for line in file:
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def describe_gpu() -> str:
    """Returns the name of the GPU."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip().replace("\n", ", ")


def describe_machine(device: str) -> dict[str, Any]:
    """Returns the processor, the memory and the versions of packages."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    memory = read_proc("/proc/meminfo", "MemTotal").split()
    return {
        "processor": read_proc("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": int(memory[0]) / 2**20 if memory else 0.0,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": describe_gpu() if device == "gpu" else "",
        "python": platform.python_version(),
        "versions": versions,
        "variables": {k: os.environ[k] for k in VARIABLES if k in os.environ},
        "load_average": os.getloadavg(),
    }


def merge(earlier: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Returns a report with the cases of an earlier report added.

    A case is measured in one run, with all contestants in turn; different cases may
    come from different runs.

    Raises:
        ValueError: if the machines or the settings differ.
    """
    for part, keys in (
        ("settings", ("quick", "device", "dtype", "contestants")),
        ("machine", ("processor", "cores", "gpu", "versions")),
    ):
        for key in keys:
            values = [x[part][key] for x in (earlier, report)]
            if values[0] != values[1]:
                raise ValueError(
                    f"Runs can't be merged: `{key}` was {values[0]} and is {values[1]}."
                )
    done = {(row["model"], row["case"]) for row in report["rows"]}
    kept = [x for x in earlier["rows"] if (x["model"], x["case"]) not in done]
    minutes = earlier["minutes"] + report["minutes"]
    return {**report, "rows": kept + report["rows"], "minutes": minutes}
