"""Generation: prefill, compiled decode steps, streams, sessions, speculation."""

from blocks.generation.compilation import GenerationSizes
from blocks.generation.options import GenerationOptions
from blocks.generation.outputs import Completion
from blocks.generation.processors import LogitsProcessor, TokensSoFar
from blocks.generation.sampling import Logprobs
from blocks.generation.scoring import Score
from blocks.generation.session import Session
from blocks.generation.speculation import DraftModel, PromptLookup, Speculation
from blocks.generation.steps import GenerationState

__all__ = [
    "Completion",
    "DraftModel",
    "GenerationOptions",
    "GenerationSizes",
    "GenerationState",
    "LogitsProcessor",
    "Logprobs",
    "PromptLookup",
    "Score",
    "Session",
    "Speculation",
    "TokensSoFar",
]
