"""Reading weights of four bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from blocks.checkpoints.conversions import Shape
from blocks.checkpoints.tensor_files import Checkpoint

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# By the four bits of a number, of which the first is the sign.
_VALUES = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], "float32")


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a checkpoint, which reads weights in MXFP4 as `bfloat16` if it has any."""
    four_bits = Mxfp4Checkpoint(checkpoint)
    return four_bits if four_bits.packed else checkpoint


class Mxfp4Checkpoint:
    """A checkpoint in which pairs of tensors are weights in MXFP4, as in GPT-OSS.

    `{name}_blocks`, of shape `(experts, columns, groups, 16)`, has two numbers in each
    byte, and `{name}_scales`, of shape `(experts, columns, groups)`, an exponent for each
    group of 32. They are read as one tensor `name`, `bfloat16` of shape `(experts, 32 *
    groups, columns)`; other tensors as they are.

    Args:
        checkpoint: the checkpoint.

    Reference:

    - [Rouhani et al., 2023](https://arxiv.org/abs/2310.10537)
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.inner = checkpoint
        self.packed: dict[str, Shape] = {}
        for blocks, shape in checkpoint.shapes().items():
            if blocks.endswith("_blocks") and len(shape) == 4:
                experts, columns, groups, size = shape
                name = blocks.removesuffix("_blocks")
                self.packed[name] = (experts, 2 * groups * size, columns)

    def shapes(self) -> dict[str, Shape]:
        found = dict(self.inner.shapes())
        for name in self.packed:
            found.pop(f"{name}_blocks")
            found.pop(f"{name}_scales", None)
        return {**found, **self.packed}

    def read(self, name: str) -> np.ndarray:
        if name not in self.packed:
            return self.inner.read(name)
        blocks = self.inner.read(f"{name}_blocks")
        exponents = self.inner.read(f"{name}_scales").astype("int32") - 127
        tensor = np.empty(self.packed[name], ml_dtypes.bfloat16)
        for i in range(len(tensor)):
            numbers = np.stack([blocks[i] & 15, blocks[i] >> 4], axis=-1)
            values = np.ldexp(_VALUES[numbers], exponents[i][..., None, None])
            tensor[i] = values.reshape((tensor.shape[2], -1)).T
        return tensor
