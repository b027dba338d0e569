"""Checks of `prefix_length` and `segment_ids`."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from attention.contract.arguments import describe
from attention.contract.checks import mask_fits
from attention.contract.sizes import is_concrete, static_size
from attention.contract.types import Index, Tensor


def check_prefix_length(layer_name: str, prefix_length: Index, inputs: Any) -> Any:
    """Returns the length of a prefix as an `int32` tensor, `()` or `(batch,)`.

    Raises a `TypeError` if it holds no integers, and a `ValueError` if it is negative
    or of another shape.
    """
    if prefix_length is None:
        return None
    if isinstance(prefix_length, (list, tuple, int)):
        prefix_length = np.asarray(prefix_length)
    wanted = (
        "an int, or an integer tensor of shape () or (batch,). Received by layer "
        f"'{layer_name}': prefix_length={describe(prefix_length)}, inputs="
        f"{describe(inputs)}"
    )
    if not hasattr(prefix_length, "shape") or "int" not in str(prefix_length.dtype):
        raise TypeError(f"`prefix_length` must be {wanted}")
    rows, given = static_size(inputs, 0), tuple(prefix_length.shape)
    if len(given) > 1 or (given and None not in (rows, given[0]) and given[0] != rows):
        raise ValueError(f"`prefix_length` must be {wanted}")
    if isinstance(prefix_length, np.ndarray) and (prefix_length < 0).any():
        raise ValueError(
            f"`prefix_length` of layer '{layer_name}' must not be negative. Received: "
            f"prefix_length={int(prefix_length.min())}"
        )
    return ops.convert_to_tensor(prefix_length, dtype="int32")


def check_segment_ids(layer_name: str, segment_ids: Tensor, inputs: Any) -> Any:
    """Returns segment ids, `(batch, length)`, as those of queries and of keys.

    Raises a `TypeError` if they are no integers, and a `ValueError` if they are of
    another shape than the inputs.
    """
    if segment_ids is None:
        return None
    if isinstance(segment_ids, (list, tuple)):
        segment_ids = np.asarray(segment_ids)
    received = (
        f"Received by layer '{layer_name}': segment_ids={describe(segment_ids)}, "
        f"inputs={describe(inputs)}"
    )
    if not hasattr(segment_ids, "shape") or "int" not in str(segment_ids.dtype):
        raise TypeError(f"`segment_ids` must be an integer tensor. {received}")
    if len(segment_ids.shape) != 2 or not mask_fits(segment_ids, inputs):
        raise ValueError(
            "`segment_ids` must be of shape (batch, length), a number for each token. "
            + received
        )
    return (ops.convert_to_tensor(segment_ids),) * 2


def only_whole_prefixes(
    layer_name: str, outputs: Tensor, prefix_length: Index, cache_update_index: Index
) -> Any:
    """Returns the outputs, and refuses calls that begin within a prefix.

    The tokens before them would have had to see the new tokens. Where the index is not
    known, in a compiled graph, the outputs of such rows are NaN.
    """
    index = ops.convert_to_tensor(cache_update_index, dtype="int32")
    within = ops.logical_and(index > 0, index < prefix_length)
    if is_concrete(within):
        if bool(ops.any(within)):
            raise ValueError(
                f"A call of layer '{layer_name}' with a cache begins within the "
                "prefix: tokens before `prefix_length` see each other in both "
                "directions, so they belong in one call, at cache_update_index=0. "
                f"Received: cache_update_index={describe(cache_update_index)}"
            )
        return outputs
    # A graph can raise no error; NaN is better than wrong outputs.
    within = ops.reshape(within, (-1, 1, 1))
    return ops.where(within, float("nan"), outputs)
