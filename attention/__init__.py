"""Cached sequence mixers: what one layer needs to know about the past."""

from attention.cache_scope import CacheScope, NewCacheScope
from attention.cached_layer import CachedLayer
from attention.cached_model import (
    call_sites,
    call_with_cache,
    create_cache,
    grow_cache,
    max_positions,
)
from attention.composite_cached_layer import CompositeCachedLayer
from attention.grouped_query_attention import (
    GroupedQueryAttention,
    clone_initializer,
)
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
    "T5Attention",
    "call_sites",
    "call_with_cache",
    "clone_initializer",
    "create_cache",
    "grow_cache",
    "max_positions",
]
