"""Fixtures that several test files use."""

import pytest

from blocks.generation import engine, state


@pytest.fixture(scope="module")
def small_generation_sizes():
    """Sizes at which short sequences take many chunks, blocks of steps, and growth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "BLOCK_STEPS", 4)
        patch.setattr(engine, "FEW_TOKENS", 2)
        patch.setattr(state, "MIN_CHUNK", 3)
        patch.setattr(state, "MIN_CAPACITY", 8)
        yield
