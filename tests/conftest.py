"""Fixtures that several test files use."""

import pytest

import blocks.generation


@pytest.fixture(scope="module")
def small_generation_sizes():
    """Sizes at which short sequences take many blocks of steps, and growth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.generation, "BLOCK_STEPS", 4)
        patch.setattr(blocks.generation, "MIN_PROMPT_LENGTH", 4)
        patch.setattr(blocks.generation, "MIN_CAPACITY", 8)
        yield
