"""Fixtures that several test files use."""

import os

# Read when TensorFlow starts. What is compiled here takes longer to optimize than it runs
# and is too small for two threads. (JAX has an option, below.)
if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import keras
import pytest

from blocks import CausalLM
from tests.models import make_backbone, make_small_lm, make_text_lm


def optimize(much):
    """Sets how much JAX optimizes: it takes longer than what is compiled here runs."""
    if keras.config.backend() == "jax":
        import jax

        jax.config.update("jax_disable_most_optimizations", not much)


optimize(False)


@pytest.fixture(autouse=True)
def optimized(request):
    """All of JAX's optimizations, for the tests that ask for them by a mark."""
    much = "optimized" in request.keywords
    if much:
        optimize(True)
    yield
    if much:
        optimize(False)


@pytest.fixture(autouse=True)
def little_xla(request, monkeypatch):
    """Leaves XLA on TensorFlow to the tests that ask for it, by a mark.

    It takes seconds to compile a model that runs for milliseconds.
    """
    if "xla" not in request.keywords:
        compile_as_asked = CausalLM.compile

        def compile_for_training(lm, *args, **kwargs):
            compile_as_asked(lm, *args, **kwargs)
            if keras.config.backend() == "tensorflow" and "jit_compile" not in kwargs:
                lm.jit_compile = False

        monkeypatch.setattr(CausalLM, "compile", compile_for_training)
        asked_for = property(
            lambda lm: lm.__dict__.get("_generation_jit_compile") is True
        )
        monkeypatch.setattr(CausalLM, "xla_generation", asked_for)


@pytest.fixture(scope="module")
def lm():
    """A small model. Tests leave it as it is, but for its sampler."""
    return make_small_lm(make_backbone(num_layers=1))


@pytest.fixture(scope="module")
def text_lm():
    """A small model of bytes, which ends rows with 1."""
    return make_text_lm()


@pytest.fixture
def calls_of(monkeypatch):
    """A function that returns a list to which each call of a method is added."""

    def watch(owner, name):
        calls, method = [], getattr(owner, name)

        def call(self, *args):
            calls.append(args)
            return method(self, *args)

        monkeypatch.setattr(owner, name, call)
        return calls

    return watch
