"""Cached sequence mixers: what one layer needs to know about the past."""

from attention.cache_scope import CacheScope, NewCacheScope
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
from attention.grouped_query_attention import GroupedQueryAttention
from attention.initializers import clone_initializer
from attention.last_tokens import last_tokens
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
from attention.shared_key_value_attention import SharedKeyValueAttention
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
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "NewCacheScope",
    "PositionEmbedding",
    "PositionScheme",
    "RelativePositionBias",
    "RotaryAttention",
    "RotaryPosition",
    "SharedKeyValueAttention",
    "T5Attention",
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
    "is_concrete",
    "last_tokens",
    "max_positions",
]
