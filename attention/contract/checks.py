"""Checks of the arguments and the results of calls."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops, tree

from attention.contract.arguments import describe, dtype_name
from attention.contract.sizes import is_tensor, static_size
from attention.contract.types import Cache, Index, Mask, Shape, Tensor


def standardize_index(cache_update_index: Index, batch_size: int | None) -> Index:
    """Returns a `cache_update_index` as an int or an `int32` tensor, and checks it.

    It is an int where it is known without reading a tensor; a tensor is of shape `()`
    or `(batch_size,)`. Raises a `TypeError` if it is not an integer, and a `ValueError`
    if it is negative or of another shape.
    """
    index: Any = cache_update_index
    if isinstance(index, (list, tuple)):
        index = np.asarray(index)
    if isinstance(index, np.ndarray) and index.ndim == 0:
        index = index[()]
    is_number = isinstance(index, (int, np.integer)) and not isinstance(index, bool)

    def received() -> str:
        # Called for an error only: a description takes long for each layer of a step.
        return f"Received: cache_update_index={describe(index)}"

    if not is_number and not is_tensor(index):
        raise TypeError(
            "`cache_update_index` must be an integer, an integer scalar tensor "
            f"or an integer tensor of shape (batch_size,). {received()}"
        )
    if not is_number and "int" not in str(index.dtype):
        raise TypeError(
            f"`cache_update_index` must have an integer dtype. {received()}"
        )
    if (is_number or isinstance(index, np.ndarray)) and np.any(index < 0):
        raise ValueError(
            "`cache_update_index` is the number of positions that the cache, or each "
            f"row of it, has processed; it can't be negative. {received()}"
        )
    if is_number:
        return int(index)
    shape = tuple(index.shape)
    known = None not in shape and batch_size is not None
    if len(shape) > 1 or (len(shape) == 1 and known and shape[0] != batch_size):
        raise ValueError(
            "`cache_update_index` must be one index for all rows or one for "
            f"each of the {batch_size} rows. {received()}"
        )
    return index if isinstance(index, keras.KerasTensor) else ops.cast(index, "int32")


def check_sequence_shape(layer_name: str, shape: Shape, what: str = "inputs") -> int:
    """Returns the width of `(batch, length, width)`, or raises a `ValueError`."""
    if len(shape) != 3 or shape[-1] is None:
        raise ValueError(
            f"Layer '{layer_name}' needs {what} of shape (batch, length, width) with "
            f"a known width. Received: shape {tuple(shape)}"
        )
    return shape[-1]


def check_padding_mask(
    layer_name: str, padding_mask: Mask, inputs: Any, what: str = "padding_mask"
) -> None:
    """Raises a `ValueError` if a padding mask does not fit the inputs.

    A mask of other sizes might broadcast to a wrong one.
    """
    if len(getattr(padding_mask, "shape", ())) == 2 and mask_fits(padding_mask, inputs):
        return
    raise ValueError(
        f"`{what}` of layer '{layer_name}' must be a boolean tensor of "
        "shape (batch, length) that marks the real tokens of these inputs, and "
        f"of no others. Received: {what}={describe(padding_mask)}, inputs="
        f"{describe(inputs)}"
    )


def mask_fits(padding_mask: Tensor, inputs: Tensor) -> bool:
    """Returns whether a mask can be of these rows and tokens, as far as is known."""
    pairs = [(static_size(padding_mask, i), static_size(inputs, i)) for i in (0, 1)]
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def check_cache(
    layer_name: str, cache: Cache, expected: Any, larger: Any, batch_size: int | None
) -> None:
    """Raises a `ValueError` if a cache is not of this layer, or not for these rows.

    The form of a layer's caches is inferred from two of them: `expected` (one row, one
    position) and `larger` (two rows, more positions). Structure, ranks and dtypes are
    the same in all, and so are those sizes that are the same in these two.
    """
    if not _same_structure(cache, expected):
        raise ValueError(
            f"`cache` was not made by layer '{layer_name}'. Received: "
            f"cache={describe(cache)}; this layer's caches look like "
            f"{describe(expected)}. Create it with `create_cache` of the layer "
            "you are calling."
        )
    leaves = zip(tree.flatten(cache), tree.flatten(expected), tree.flatten(larger))
    for leaf, one, two in leaves:
        shape = tuple(a if a == b else None for a, b in zip(one.shape, two.shape))
        if not _is_like(leaf, shape, one):
            raise ValueError(
                f"`cache` was not made by layer '{layer_name}': one of its "
                f"tensors is a {describe(leaf)}, where this layer's have dtype "
                f"{dtype_name(one)} and shape {shape} (None: any size). "
                "Create it with `create_cache` of the layer you are calling, "
                "and again after its dtype policy has changed."
            )
        rows = static_size(leaf, 0)
        if None not in (rows, batch_size) and rows != batch_size:
            raise ValueError(
                f"Layer '{layer_name}' was called with {batch_size} rows and a "
                f"cache made for batch_size={rows}. Create the cache with "
                f"batch_size={batch_size}."
            )


class UpdatedCacheError(ValueError):
    """Raised when a layer returns another kind of cache than it received."""


def check_updated_cache(layer_name: str, cache: Cache, outputs: Any) -> None:
    """Raises an error if a layer's `call` returned no cache like the one received."""
    if not isinstance(outputs, tuple) or len(outputs) != 2:
        raise TypeError(
            f"Layer '{layer_name}' was called with a cache; its `call` must "
            f"then return `(outputs, cache)`. It returned {describe(outputs)}."
        )
    updated = outputs[1]
    same = _same_structure(cache, updated) and all(
        _is_like(b, tuple(a.shape), a)
        for a, b in zip(tree.flatten(cache), tree.flatten(updated))
    )
    if not same:
        raise UpdatedCacheError(
            f"Layer '{layer_name}' must return the cache in the structure, "
            f"shapes and dtypes in which it got it. It got {describe(cache)} and "
            f"returned {describe(updated)}."
        )


def _same_structure(first: Any, second: Any) -> bool:
    try:
        tree.assert_same_structure(first, second)
    except (ValueError, TypeError):
        return False
    return True


def _is_like(x: Any, shape: tuple, like: Any) -> bool:
    """Returns whether `x` is a tensor of a shape, `None` any size, and of a dtype."""
    return (
        is_tensor(x)
        and dtype_name(x) == dtype_name(like)
        and len(x.shape) == len(shape)
        and all(None in pair or pair[0] == pair[1] for pair in zip(x.shape, shape))
    )


def check_rewind_indices(from_index: Index, to_index: Index) -> None:
    """Raises a `ValueError` unless both are integers, `from_index >= to_index >= 0`."""
    known = all(
        isinstance(x, (int, np.integer)) and not isinstance(x, bool)
        for x in (from_index, to_index)
    )
    if not known or not from_index >= to_index >= 0:
        raise ValueError(
            "`from_index`, how many positions the cache has processed, and `to_index`, "
            "how many of them are kept, must be integers with from_index >= to_index "
            f">= 0. Received: from_index={describe(from_index)}, "
            f"to_index={describe(to_index)}. Where rows differ, ask with the largest "
            "`from_index` and the smallest `to_index`."
        )
