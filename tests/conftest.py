"""Fixtures that several test files use."""

import pytest

from blocks import CausalLM
from blocks.generation import engine, state


def make_sizes_small(patch):
    patch.setattr(engine, "BLOCK_STEPS", 4)
    patch.setattr(engine, "FEW_TOKENS", 2)
    patch.setattr(state, "MIN_CHUNK", 3)
    patch.setattr(state, "MIN_CAPACITY", 8)


@pytest.fixture(scope="module")
def small_generation_sizes():
    """Sizes at which short sequences take many chunks, blocks of steps, and growth."""
    with pytest.MonkeyPatch.context() as patch:
        make_sizes_small(patch)
        yield


@pytest.fixture
def small_sizes_in_this_test(monkeypatch):
    """As `small_generation_sizes`, for one test."""
    make_sizes_small(monkeypatch)


@pytest.fixture(autouse=True)
def little_xla(request, monkeypatch):
    """Leaves XLA on TensorFlow to the tests that ask for it, by a mark.

    It takes seconds to compile a model that runs for milliseconds.
    """
    if "xla" not in request.keywords:
        asked_for = property(
            lambda lm: lm.__dict__.get("_generation_jit_compile") is True
        )
        monkeypatch.setattr(CausalLM, "xla_generation", asked_for)
