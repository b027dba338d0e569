"""Set-up for all tests and doctests: quiet logs, one seed, one dtype policy."""

import atexit
import gc
import importlib.util
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tiny models are compiled often and run briefly: threads that wait for each
# other and an optimizer of machine code take longer than what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
flags = "--xla_backend_optimization_level=0"
if os.environ["KERAS_BACKEND"] == "jax":
    # Halves what compiling takes.
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", flags)
# What several tests and processes compile on JAX, such as small operations, is compiled
# once. Processes that are started from here inherit the folder.
if (
    os.environ["KERAS_BACKEND"] == "jax"
    and "JAX_COMPILATION_CACHE_DIR" not in os.environ
):
    folder = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Doctests import each module; these import a backend that need not be there.
collect_ignore = [
    f"blocks/generation/backends/{name}_steps.py"
    for name in ("jax", "torch")
    if importlib.util.find_spec(name) is None
]
# Tracing makes many objects that live on: looking for garbage so seldom takes a
# twentieth off the time.
gc.set_threshold(100_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Runs the whole suite on several processes, where pytest-xdist is there.

    Single files run in this process; `-n 0` asks for it.
    """
    option = config.option
    # The processes it starts come by here, too.
    is_worker = hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ
    by_itself = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    unset = getattr(option, "numprocesses", 0) is None
    if by_itself and unset and not is_worker and not option.usepdb:
        option.numprocesses = 2


def pytest_itemcollected(item):
    if os.environ["KERAS_BACKEND"] == "jax" and item.get_closest_marker("slow_on_jax"):
        item.add_marker("slow")


@pytest.fixture(autouse=True)
def _same_start_for_each_test():
    """Each test draws the same weights, and leaves the global policy alone."""
    import keras  # after the variables above

    policy = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy(policy)
