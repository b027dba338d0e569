"""Generation: prefill, compiled decode blocks, streams, sessions, speculation."""

from blocks.generation.session import Session
from blocks.generation.speculation import DraftModel, PromptLookup, Speculation
from blocks.generation.state import GenerationState

__all__ = [
    "DraftModel",
    "GenerationState",
    "PromptLookup",
    "Session",
    "Speculation",
]
