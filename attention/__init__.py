"""Cached sequence mixers: what one layer needs to know about the past."""

from attention.cache_scope import (
    CacheScope,
    NewCacheScope,
    hide_scope,
    share_padding_mask,
)
from attention.cached_layer import CachedLayer
from attention.cached_model import (
    call_sites,
    call_with_cache,
    can_rewind,
    create_cache,
    find_not_rewindable,
    grow_cache,
    max_positions,
)
from attention.composite_cached_layer import CompositeCachedLayer
from attention.cross_attention import CrossAttention
from attention.differential_attention import DifferentialAttention
from attention.gated_delta_net import GatedDeltaNet
from attention.grouped_query_attention import GroupedQueryAttention
from attention.initializers import clone_initializer
from attention.last_tokens import last_tokens
from attention.latent_attention import LatentAttention
from attention.linear_recurrence import LinearRecurrence
from attention.mamba import Mamba2
from attention.multi_head_attention import (
    MultiHeadAttention,
    MultiQueryAttention,
    RotaryAttention,
    T5Attention,
)
from attention.position_embedding import PositionEmbedding
from attention.position_schemes import (
    AlibiBias,
    PositionScheme,
    RelativePositionBias,
    RotaryPosition,
)
from attention.prefix import WholePromptNeeded, prompt_in_chunks
from attention.retention import Retention
from attention.rwkv import RWKVChannelMix, RWKVTimeMix
from attention.shared_key_value_attention import SharedKeyValueAttention
from attention.short_convolution import ShortConvolution, TokenShift
from attention.validation import (
    check_fraction,
    check_positive_int,
    describe,
    is_concrete,
)

__all__ = [
    "AlibiBias",
    "CacheScope",
    "CachedLayer",
    "CompositeCachedLayer",
    "CrossAttention",
    "DifferentialAttention",
    "GatedDeltaNet",
    "GroupedQueryAttention",
    "LatentAttention",
    "LinearRecurrence",
    "Mamba2",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "NewCacheScope",
    "PositionEmbedding",
    "PositionScheme",
    "RWKVChannelMix",
    "RWKVTimeMix",
    "RelativePositionBias",
    "Retention",
    "RotaryAttention",
    "RotaryPosition",
    "SharedKeyValueAttention",
    "ShortConvolution",
    "T5Attention",
    "TokenShift",
    "WholePromptNeeded",
    "call_sites",
    "call_with_cache",
    "can_rewind",
    "check_fraction",
    "check_positive_int",
    "clone_initializer",
    "create_cache",
    "describe",
    "find_not_rewindable",
    "grow_cache",
    "hide_scope",
    "is_concrete",
    "last_tokens",
    "max_positions",
    "prompt_in_chunks",
    "share_padding_mask",
]
