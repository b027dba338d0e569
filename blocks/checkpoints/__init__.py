"""Published checkpoints: their tables of weights, reading and writing them."""

from blocks.checkpoints.architecture import (
    Architecture,
    known_model_types,
    register_architecture,
)
from blocks.checkpoints.conversions import (
    Changed,
    Conversion,
    Convolution,
    Dense,
    DenseByGroup,
    Depthwise,
    Plain,
    Stacked,
    attention_lines,
    attention_paths,
    layer_lines,
    rows_by_group,
    rows_in_pairs,
)
from blocks.checkpoints.sizes import known_sizes

__all__ = [
    "Architecture",
    "Changed",
    "Conversion",
    "Convolution",
    "Dense",
    "DenseByGroup",
    "Depthwise",
    "Plain",
    "Stacked",
    "attention_lines",
    "attention_paths",
    "known_model_types",
    "known_sizes",
    "layer_lines",
    "register_architecture",
    "rows_by_group",
    "rows_in_pairs",
]
