"""Layers that mix along the sequence, with a cache: attention and recurrences."""

from attention.caches.cache_policy import CachePolicy
from attention.caches.full_cache import FullCache
from attention.caches.quantized_cache import QuantizedCache
from attention.caches.ring_cache import RingCache
from attention.caches.writes import write_tokens
from attention.contract import (
    CachedLayer,
    CacheScope,
    CompositeCachedLayer,
    NewCacheScope,
    ScoreScope,
    SegmentScope,
    call_sites,
    call_with_cache,
    can_rewind,
    create_cache,
    declare_axes,
    declare_role,
    grow_cache,
    last_tokens,
    write_source,
)
from attention.positions.alibi_bias import AlibiBias
from attention.positions.arithmetic import token_positions
from attention.positions.position_embedding import PositionEmbedding
from attention.positions.position_scheme import PositionScheme
from attention.positions.relative_position_bias import RelativePositionBias
from attention.positions.rotary_position import RotaryPosition
from attention.positions.sinusoidal_positions import SinusoidalPositions
from attention.recurrent.gated_delta_net import GatedDeltaNet
from attention.recurrent.linear_recurrence import LinearRecurrence
from attention.recurrent.mamba2 import Mamba2
from attention.recurrent.retention import Retention
from attention.recurrent.rwkv_channel_mix import RWKVChannelMix
from attention.recurrent.rwkv_time_mix import RWKVTimeMix
from attention.recurrent.short_convolution import ShortConvolution
from attention.recurrent.token_shift import TokenShift
from attention.softmax.cross_attention import CrossAttention
from attention.softmax.differential_attention import DifferentialAttention
from attention.softmax.dot_product_attention import DotProductAttention
from attention.softmax.grouped_query_attention import GroupedQueryAttention
from attention.softmax.latent_attention import LatentAttention
from attention.softmax.multi_head_attention import MultiHeadAttention
from attention.softmax.multi_query_attention import MultiQueryAttention
from attention.softmax.rotary_attention import RotaryAttention
from attention.softmax.shared_key_value_attention import SharedKeyValueAttention
from attention.softmax.t5_attention import T5Attention
from attention.softmax.visibility import Visibility

__all__ = [
    "AlibiBias",
    "CachePolicy",
    "CacheScope",
    "CachedLayer",
    "CompositeCachedLayer",
    "CrossAttention",
    "DifferentialAttention",
    "DotProductAttention",
    "FullCache",
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
    "QuantizedCache",
    "RWKVChannelMix",
    "RWKVTimeMix",
    "RelativePositionBias",
    "Retention",
    "RingCache",
    "RotaryAttention",
    "RotaryPosition",
    "ScoreScope",
    "SegmentScope",
    "SharedKeyValueAttention",
    "ShortConvolution",
    "SinusoidalPositions",
    "T5Attention",
    "TokenShift",
    "Visibility",
    "call_sites",
    "call_with_cache",
    "can_rewind",
    "create_cache",
    "declare_axes",
    "declare_role",
    "grow_cache",
    "last_tokens",
    "token_positions",
    "write_source",
    "write_tokens",
]
