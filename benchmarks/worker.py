"""One contestant in a process of its own, started by `benchmarks.processes`.

Requests and replies are lines of JSON, on standard input and on a duplicate of
standard output. All other output goes to standard error, so that a warning of a
library is not taken for a reply.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.timing import fastest
from benchmarks.weights import ModelShape, load_weights

# The rows and columns of the matrices whose product shows the limit of the cores.
MATRIX = 2048


def make_contestant(name: str) -> Any:
    """Makes a contestant by its name, such as `"ours/tensorflow"`."""
    library, variant = name.split("/")
    if library == "transformers":
        from benchmarks.torch_contestants import Transformers

        return Transformers()
    from benchmarks.keras_contestants import KerasHub, Ours

    if library == "ours":
        return Ours()
    return KerasHub(True if variant.endswith("-xla") else "auto")


def until_stop(tokens: list[int], stops: list[int] | None) -> list[int]:
    """Returns the tokens up to the first stop token, which is included."""
    for i, token in enumerate(tokens):
        if stops and token in stops:
            return tokens[: i + 1]
    return tokens


def count_backend_compilations() -> Callable[[], int]:
    """Returns a function that tells how many times JAX has called XLA since."""
    import jax

    events: list[str] = []

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: len(events)


def peak_memory() -> dict[str, Any]:
    """Returns the peak memory so far, of the device if there is one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return {"bytes": torch.cuda.max_memory_allocated(), "of": "device, torch"}
    backend = os.environ.get("KERAS_BACKEND")
    if backend == "jax":
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return {"bytes": stats["peak_bytes_in_use"], "of": "device, JAX"}
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
            return {"bytes": peak, "of": "device, TensorFlow"}
    with open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return {"bytes": int(line.split()[1]) * 1024, "of": "process"}
    raise RuntimeError("This system does not report the peak memory of a process.")


def reset_peak_memory() -> bool:
    """Resets the peak memory of the process; returns whether that is allowed."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")
    except OSError:
        return False
    return True


def others_seconds() -> float:
    """Returns the processor seconds that all other processes have used so far.

    Time that a hypervisor gave to other machines is included. Only differences have
    a meaning; they are 0 where the system does not report it.
    """
    own = os.times()
    try:
        with open("/proc/stat", encoding="utf-8") as file:
            ticks = [int(x) for x in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    # User, nice, system, (idle, waiting,) interrupts, soft interrupts, stolen.
    busy = sum(ticks) - ticks[3] - ticks[4]
    return busy / os.sysconf("SC_CLK_TCK") - own.user - own.system


class Worker:
    """Answers requests for one contestant: a method for each operation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.contestant: Any = None
        self.backend_compilations: Callable[[], int] | None = None
        if name == "bandwidth":
            from benchmarks.torch_contestants import Bandwidth

            self.contestant = Bandwidth()
        else:
            self.contestant = make_contestant(name)
            if os.environ.get("KERAS_BACKEND") == "jax":
                self.backend_compilations = count_backend_compilations()

    def load(self, shape: dict, weights: str, dtype: str) -> dict[str, Any]:
        """Makes a new model, with nothing compiled."""
        self.contestant = None
        gc.collect()
        self.contestant = make_contestant(self.name)
        self.contestant.load(ModelShape(**shape), load_weights(weights), dtype)
        gc.collect()
        return {}

    def timed(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict]:
        """Calls a function; returns what it does, the seconds and others' seconds."""
        others, start = others_seconds(), time.perf_counter()
        outputs = function(*arguments)
        seconds, others = time.perf_counter() - start, others_seconds() - others
        return outputs, {"seconds": seconds, "others": others}

    def generate(
        self,
        prompts: list[list[int]],
        max_length: int,
        max_new_tokens: int | None = None,
        stops: list[int] | None = None,
    ) -> dict[str, Any]:
        """Generates once, and returns the seconds and the tokens."""
        inputs = self.contestant.prepare(prompts, max_length)
        arguments = (max_length, max_new_tokens, None if stops is None else (*stops,))
        outputs, times = self.timed(self.contestant.generate, inputs, *arguments)
        rows = self.contestant.new_tokens(prompts, outputs)
        return {**times, "tokens": [until_stop(row, stops) for row in rows]}

    def train(self, tokens: list[list[int]], rows: int) -> dict[str, Any]:
        """Trains once on each batch of so many rows.

        Returns:
            The seconds, the mean loss and `compiled`, 0 if nothing was.
        """
        batches = np.array(tokens, "int32")
        compiled = self.compiled_for_training()
        loss, times = self.timed(self.contestant.train, batches, rows)
        compiled = self.compiled_for_training() - compiled
        return {**times, "loss": loss, "compiled": compiled}

    def compiled_for_training(self) -> int:
        """Returns a number that grows when something is compiled."""
        backend = self.backend_compilations() if self.backend_compilations else 0
        return backend + self.contestant.traced_steps()

    def products_part(self, tokens: list[list[int]], rows: int) -> dict[str, float]:
        """Returns the products' part of the time of training, for transformers."""
        part = self.contestant.products_part(np.array(tokens, "int32"), rows)
        return {"part": part}

    def count(self, prompts: list[list[int]], max_new_tokens: int) -> dict[str, Any]:
        """Generates from each prompt by itself, and counts compilations."""
        steps = self.contestant.compilations() or 0
        backend = self.backend_compilations() if self.backend_compilations else 0
        seconds, tokens = 0.0, []
        for row in prompts:
            reply = self.generate([row], len(row) + max_new_tokens, max_new_tokens)
            seconds += reply["seconds"]
            tokens += reply["tokens"]
        found: dict[str, Any] = {"seconds": seconds, "tokens": tokens}
        if self.contestant.compilations() is not None:
            found["steps"] = self.contestant.compilations() - steps
        if self.backend_compilations:
            found["backend"] = self.backend_compilations() - backend
        return found

    def memory(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Does an operation once, and adds the peak memory to its reply."""
        was_reset = reset_peak_memory()
        reply = getattr(self, what)(**arguments)
        return {**reply, **peak_memory(), "was_reset": was_reset}

    def cache_elements(self, prompts: list, max_length: int) -> dict[str, Any]:
        """Returns the number of elements in this library's KV cache."""
        return {"elements": self.contestant.cache_elements(prompts, max_length)}

    def gap(self, row: list[int], first: int, second: int) -> dict[str, float]:
        """Returns by how much the logit of one token exceeds that of another."""
        logits = self.contestant.logits(row)
        return {"gap": float(logits[first] - logits[second])}

    def bandwidth(self) -> dict[str, float]:
        """Returns the bytes per second of each operation."""
        return self.contestant.measure()

    def matrix_limit(self) -> dict[str, float]:
        """Returns the float32 operations per second of a large product, by backend."""
        seconds = fastest(self.contestant.large_product(MATRIX), times=10)
        backend = os.environ["KERAS_BACKEND"]
        return {f"{backend}'s matmul": 2 * MATRIX**3 / seconds}


def serve(name: str) -> None:
    """Answers requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    operations: dict[str, Callable[..., dict]] = {}

    def start() -> dict[str, Any]:
        worker = Worker(name)
        for operation in (
            "load",
            "generate",
            "train",
            "products_part",
            "count",
            "memory",
            "cache_elements",
            "gap",
            "bandwidth",
            "matrix_limit",
        ):
            operations[operation] = getattr(worker, operation)
        return {}

    def answer(function: Callable[..., dict], arguments: dict[str, Any]) -> None:
        try:
            reply = function(**arguments)
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines()
            reply = {"error": f"{type(error).__name__}: {(text or [''])[0][:300]}"}
        print(json.dumps(reply), file=replies, flush=True)

    answer(start, {})
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("operation")
        answer(operations[operation], request)


if __name__ == "__main__":
    serve(sys.argv[1])
