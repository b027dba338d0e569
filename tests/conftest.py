"""Fixtures that several test files use."""

import os

# Read when TensorFlow starts. What is compiled here takes longer to optimize than it runs
# and is too small for two threads. (JAX has an option, below.)
if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import keras
import pytest

from blocks.language_model import LanguageModel
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


_compile, _xla_generation = LanguageModel.compile, LanguageModel.xla_generation


def _compile_for_training(lm, *args, **kwargs):
    _compile(lm, *args, **kwargs)
    if keras.config.backend() == "tensorflow" and "jit_compile" not in kwargs:
        lm.jit_compile = False


@pytest.fixture(scope="session", autouse=True)
def little_xla():
    """Leaves XLA on TensorFlow to the tests that ask for it, by a mark.

    It takes seconds to compile a model that runs for milliseconds. For the session, as
    what is made for a module is made before the fixtures of its tests.
    """
    asked_for = property(lambda lm: lm.__dict__.get("_generation_jit_compile") is True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "compile", _compile_for_training)
        patch.setattr(LanguageModel, "xla_generation", asked_for)
        yield


@pytest.fixture(autouse=True)
def xla(request, monkeypatch):
    """XLA as everywhere else, for the tests that ask for it by a mark."""
    if "xla" in request.keywords:
        monkeypatch.setattr(LanguageModel, "compile", _compile)
        monkeypatch.setattr(LanguageModel, "xla_generation", _xla_generation)


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
