"""The contract of cached layers: its base classes, scopes, and caches of models.

`blocks` imports from here what it needs beyond the public names of `attention`.
"""

from attention.contract.arguments import (
    arguments_of,
    check_fraction,
    check_number,
    check_optional_positive_int,
    check_positive_int,
    describe,
)
from attention.contract.cached_layer import CachedLayer
from attention.contract.cached_model import (
    call_sites,
    call_with_cache,
    can_rewind,
    create_cache,
    find_not_rewindable,
    grow_cache,
    max_positions,
    write_source,
)
from attention.contract.calls import Untracked
from attention.contract.composite_cached_layer import CompositeCachedLayer
from attention.contract.context import change_context
from attention.contract.inner_layers import (
    Dense,
    add_bias,
    all_layers,
    clone_initializer,
)
from attention.contract.padding import check_right_padded, last_tokens
from attention.contract.remat import (
    build_as_one,
    hide_full_remat,
    rematerialize_tensors,
)
from attention.contract.roles import (
    FEED_FORWARD_ROLES,
    ROLES,
    Names,
    declare_axes,
    declare_role,
    role_of,
)
from attention.contract.scopes import CacheScope, NewCacheScope
from attention.contract.scores import ScoreScope, keep_scores, scores_wanted
from attention.contract.segments import SegmentScope, segment_positions, segment_starts
from attention.contract.sizes import is_concrete, is_tensor
from attention.contract.types import (
    Activation,
    Cache,
    DType,
    Index,
    Initializer,
    Mask,
    Shape,
    Tensor,
)
from attention.contract.weight_axes import WeightAxes, axes_of_weights, known_axes

__all__ = [
    "FEED_FORWARD_ROLES",
    "ROLES",
    "Activation",
    "Cache",
    "CacheScope",
    "CachedLayer",
    "CompositeCachedLayer",
    "DType",
    "Dense",
    "Index",
    "Initializer",
    "Mask",
    "Names",
    "NewCacheScope",
    "ScoreScope",
    "SegmentScope",
    "Shape",
    "Tensor",
    "Untracked",
    "WeightAxes",
    "add_bias",
    "all_layers",
    "arguments_of",
    "axes_of_weights",
    "build_as_one",
    "call_sites",
    "call_with_cache",
    "can_rewind",
    "change_context",
    "check_fraction",
    "check_number",
    "check_optional_positive_int",
    "check_positive_int",
    "check_right_padded",
    "clone_initializer",
    "create_cache",
    "declare_axes",
    "declare_role",
    "describe",
    "find_not_rewindable",
    "grow_cache",
    "hide_full_remat",
    "is_concrete",
    "is_tensor",
    "keep_scores",
    "known_axes",
    "last_tokens",
    "max_positions",
    "rematerialize_tensors",
    "role_of",
    "scores_wanted",
    "segment_positions",
    "segment_starts",
    "write_source",
]
