"""Generation: prefill, compiled decode steps, streams, sessions, speculation."""

from blocks.generation.compilation import GenerationSizes
from blocks.generation.session import Session
from blocks.generation.speculation import DraftModel, PromptLookup, Speculation
from blocks.generation.steps import GenerationState

__all__ = [
    "DraftModel",
    "GenerationSizes",
    "GenerationState",
    "PromptLookup",
    "Session",
    "Speculation",
]
