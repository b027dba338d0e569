"""Blocks, backbones and language models, which know no cache."""

from attention.contract import clone_initializer
from blocks.causal_lm import CausalLM
from blocks.custom_backbone import CustomBackbone
from blocks.custom_decoder import CustomDecoder
from blocks.custom_encoder import CustomEncoder
from blocks.custom_encoder_backbone import CustomEncoderBackbone
from blocks.custom_seq2seq_backbone import CustomSeq2SeqBackbone
from blocks.distribution import make_layout_map
from blocks.embedded_prompts import EmbeddingInputs
from blocks.generation import (
    Completion,
    DraftModel,
    GenerationOptions,
    GenerationSizes,
    GenerationState,
    LogitsProcessor,
    Logprobs,
    PromptLookup,
    Score,
    Session,
    Speculation,
    TokensSoFar,
)
from blocks.json_tokenizer import JsonTokenizer
from blocks.layers.feed_forward import FeedForward, GatedFeedForward, gelu_approximate
from blocks.layers.mixture_of_experts import MixtureOfExperts
from blocks.layers.norms import DynamicTanh
from blocks.masked_lm import MaskedLM
from blocks.packing import PackedDocuments
from blocks.plots import attention_maps, attention_scores, plot_history
from blocks.preference_tuning import PreferenceTuning
from blocks.preprocessor import CausalLMPreprocessor
from blocks.seq2seq_lm import Seq2SeqLM
from blocks.seq2seq_preprocessor import Seq2SeqLMPreprocessor
from blocks.serving import Request, Server, ServerBusy
from blocks.swap import SwapReport
from blocks.text_classifier import TextClassifier, TokenClassifier
from blocks.text_embedder import TextEmbedder
from blocks.training.backup import BackupAndResume
from blocks.training.muon import Muon
from blocks.training.perplexity import Perplexity
from blocks.training.token_crossentropy import TokenCrossentropy

__all__ = [
    "BackupAndResume",
    "CausalLM",
    "CausalLMPreprocessor",
    "Completion",
    "CustomBackbone",
    "CustomDecoder",
    "CustomEncoder",
    "CustomEncoderBackbone",
    "CustomSeq2SeqBackbone",
    "DraftModel",
    "DynamicTanh",
    "EmbeddingInputs",
    "FeedForward",
    "GatedFeedForward",
    "GenerationOptions",
    "GenerationSizes",
    "GenerationState",
    "JsonTokenizer",
    "LogitsProcessor",
    "Logprobs",
    "MaskedLM",
    "MixtureOfExperts",
    "Muon",
    "PackedDocuments",
    "Perplexity",
    "PreferenceTuning",
    "PromptLookup",
    "Request",
    "Score",
    "Seq2SeqLM",
    "Seq2SeqLMPreprocessor",
    "Server",
    "ServerBusy",
    "Session",
    "Speculation",
    "SwapReport",
    "TextClassifier",
    "TextEmbedder",
    "TokenClassifier",
    "TokenCrossentropy",
    "TokensSoFar",
    "attention_maps",
    "attention_scores",
    "clone_initializer",
    "gelu_approximate",
    "make_layout_map",
    "plot_history",
]
