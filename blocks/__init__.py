"""Decoder blocks, backbones and language models that know no cache."""

from attention import clone_initializer
from blocks.causal_lm import CausalLM
from blocks.custom_backbone import CustomBackbone
from blocks.custom_decoder import CustomDecoder
from blocks.feed_forward import FeedForward, GatedFeedForward, gelu_approximate
from blocks.generation import (
    DraftModel,
    GenerationState,
    PromptLookup,
    Session,
    Speculation,
)
from blocks.preprocessor import CausalLMPreprocessor

__all__ = [
    "CausalLM",
    "CausalLMPreprocessor",
    "CustomBackbone",
    "CustomDecoder",
    "DraftModel",
    "FeedForward",
    "GatedFeedForward",
    "GenerationState",
    "PromptLookup",
    "Session",
    "Speculation",
    "clone_initializer",
    "gelu_approximate",
]
