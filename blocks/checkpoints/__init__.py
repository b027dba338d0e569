"""Published checkpoints: their tables of weights, reading and writing them."""

from blocks.checkpoints.architecture import (
    Architecture,
    known_model_types,
    register_architecture,
)
from blocks.checkpoints.conversions import (
    Changed,
    Conversion,
    Dense,
    DenseByGroup,
    Depthwise,
    Plain,
    Stacked,
)

__all__ = [
    "Architecture",
    "Changed",
    "Conversion",
    "Dense",
    "DenseByGroup",
    "Depthwise",
    "Plain",
    "Stacked",
    "known_model_types",
    "register_architecture",
]
