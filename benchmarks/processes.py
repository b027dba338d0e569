"""Starts the processes of contestants, and sends them requests."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import select
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.weights import ModelShape

ROOT = pathlib.Path(__file__).parent.parent


class WorkerError(RuntimeError):
    """Raised when a contestant fails; the message says how."""


def environment(contestant: str, device: str) -> dict[str, str]:
    """Returns the environment variables of a contestant's process."""
    found = dict(os.environ)
    library, _, variant = contestant.partition("/")
    found["KERAS_BACKEND"] = variant.split("-")[0]
    if library in ("transformers", "bandwidth"):
        found["KERAS_BACKEND"] = "torch"
    found.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    found["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = "-1"
        found["JAX_PLATFORMS"] = "cpu"
    else:
        # All contestants share one GPU: none may reserve all of its memory.
        found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        found["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    return found


class WorkerProcess:
    """One contestant's process.

    Args:
        contestant: its name, such as `"keras_hub/jax"`.
        logs: the folder for its output.
        device: `"cpu"` or `"gpu"`.
        timeout: how many seconds to wait for a reply.
    """

    def __init__(
        self,
        contestant: str,
        logs: pathlib.Path,
        device: str = "cpu",
        timeout: float = 3600.0,
    ) -> None:
        self.contestant = contestant
        self.timeout = timeout
        self.log = logs / f"{contestant.replace('/', '-')}.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", contestant],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment(contestant, device),
                text=True,
            )
        self.started = False

    @property
    def alive(self) -> bool:
        """Returns whether the process still runs."""
        return self.process.poll() is None

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for the reply.

        Raises:
            WorkerError: if the contestant fails, dies or exceeds the timeout.
        """
        if not self.started:
            # The first line says whether everything could be imported.
            self.receive()
            self.started = True
        try:
            request = json.dumps({"operation": operation, **arguments})
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"died: {self.last_words()}") from error
        return self.receive()

    def receive(self) -> dict[str, Any]:
        """Waits for a reply and returns it."""
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout)
        if not ready:
            self.process.kill()
            raise WorkerError(f"no answer within {self.timeout:g} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise WorkerError(f"died: {self.last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def last_words(self) -> str:
        """Returns the end of the output of the process."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return " / ".join(line.strip() for line in lines if line.strip())[-300:]

    def close(self) -> None:
        """Ends the process."""
        if self.alive:
            self.process.stdin.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class WorkerPool:
    """The processes of all contestants, each with the current model loaded.

    Args:
        contestants: their names.
        shape: the model.
        weights: the file that every process loads.
        dtype: of weights and computations.
        device: `"cpu"` or `"gpu"`.
        folder: the folder for their output.
        together: how many contestants may compile at a time; each keeps about one
            core busy.
    """

    def __init__(
        self,
        contestants: list[str],
        shape: ModelShape,
        weights: pathlib.Path,
        dtype: str,
        device: str,
        folder: pathlib.Path,
        together: int,
    ) -> None:
        self.together = together
        self.contestants, self.shape, self.weights = contestants, shape, weights
        self.dtype, self.device, self.folder = dtype, device, folder
        self.workers: dict[str, WorkerProcess] = {}

    def close(self) -> None:
        """Ends all processes."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def start(self, name: str) -> WorkerProcess:
        """Starts a fresh process and returns it at once."""
        return WorkerProcess(name, self.folder, self.device)

    def load(self, worker: WorkerProcess) -> None:
        """Makes the model in a process, with nothing compiled."""
        worker.call(
            "load",
            shape=dataclasses.asdict(self.shape),
            weights=str(self.weights),
            dtype=self.dtype,
        )

    def worker(self, name: str) -> WorkerProcess:
        """Returns the process of a contestant with the model, started if needed."""
        worker = self.workers.get(name)
        if worker is None or not worker.alive:
            worker = self.workers[name] = self.start(name)
            if name != "bandwidth":
                try:
                    self.load(worker)
                except WorkerError:
                    # The next case starts a fresh process.
                    worker.close()
                    raise
        return worker

    def worker_with_new_model(self, name: str) -> WorkerProcess:
        """Returns the process of a contestant, with nothing trained or compiled."""
        worker = self.workers.get(name)
        if worker is None or not worker.alive:
            return self.worker(name)
        self.load(worker)
        return worker

    def for_each(
        self, function: Callable[[str], Any], errors: dict[str, str]
    ) -> dict[str, Any]:
        """Calls a function for all contestants that have not failed yet.

        `together` contestants at a time, so it is not for timing.

        Args:
            function: takes the name of a contestant.
            errors: the errors so far by contestant; new ones are added.

        Returns:
            The results of the function by contestant.
        """

        def attempt(name: str) -> Any:
            try:
                return function(name)
            except WorkerError as error:
                errors[name] = str(error)
                return None

        names = [name for name in self.contestants if name not in errors]
        with ThreadPoolExecutor(self.together) as threads:
            results = dict(zip(names, threads.map(attempt, names)))
        return {name: results[name] for name in names if name not in errors}
