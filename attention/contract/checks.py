"""Checks of the arguments and the results of calls."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops, tree

from attention.contract.arguments import describe, dtype_name
from attention.contract.sizes import static_size
from attention.contract.types import Cache, Index, Mask, Shape, Tensor


def standardize_index(cache_update_index: Index, batch_size: int | None) -> Index:
    """Checks a `cache_update_index`, and turns NumPy integers into ints.

    Args:
        cache_update_index: int, integer scalar tensor or integer tensor of
            shape `(batch_size,)`.
        batch_size: int or `None`. The number of rows, where it is known.

    Returns:
        An int where it is known without reading a tensor, otherwise an `int32` tensor
        of rank 0 or 1.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is negative or of another shape.
    """
    index = cache_update_index
    if isinstance(index, (bool, float)):
        raise TypeError(
            "`cache_update_index` must be an integer, an integer scalar tensor "
            "or an integer tensor of shape (batch_size,). Received: "
            f"cache_update_index={describe(index)}"
        )
    if isinstance(index, np.ndarray) and index.ndim == 0:
        index = index[()]
    if isinstance(index, (int, np.integer)):
        if index < 0:
            raise ValueError(
                "`cache_update_index` is the number of positions the cache has "
                f"processed; it can't be negative. Received: {index}"
            )
        return int(index)
    if isinstance(index, (list, tuple)):
        index = np.asarray(index)
    if isinstance(index, np.ndarray) and index.dtype.kind == "i" and (index < 0).any():
        raise ValueError(
            "`cache_update_index` holds the numbers of positions the rows have "
            "processed; they can't be negative. Received: cache_update_index="
            f"{describe(index)} with a negative entry"
        )
    if not hasattr(index, "shape") or not hasattr(index, "dtype"):
        raise TypeError(
            "`cache_update_index` must be an integer, an integer scalar tensor "
            "or an integer tensor of shape (batch_size,). Received: "
            f"cache_update_index={describe(index)}"
        )
    if "int" not in str(index.dtype):
        raise TypeError(
            "`cache_update_index` must have an integer dtype. Received: "
            f"cache_update_index={describe(index)}"
        )
    shape = tuple(index.shape)
    known = None not in shape and batch_size is not None
    if len(shape) > 1 or (len(shape) == 1 and known and shape[0] != batch_size):
        raise ValueError(
            "`cache_update_index` must be one index for all rows or one for "
            f"each of the {batch_size} rows. Received: "
            f"cache_update_index={describe(index)}"
        )
    if isinstance(index, keras.KerasTensor):
        return index
    return ops.cast(index, "int32")


def check_sequence_shape(layer_name: str, shape: Shape, what: str = "inputs") -> int:
    """Checks that a layer is built for `(batch, length, width)`.

    Args:
        layer_name: str. The name of the layer.
        shape: tuple. The shape of its inputs.
        what: str. What these inputs are called.

    Returns:
        The width.

    Raises:
        ValueError: if there is another number of axes, or no width.
    """
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
    """Checks that a cache was made by this layer for this batch size.

    The form of a layer's caches is inferred from two of them: `expected` (one row,
    one position) and `larger` (two rows, more positions). Structure, ranks and dtypes
    are the same in all, and so are those sizes that are the same in these two.

    Args:
        layer_name: str. The name of the layer, for the message.
        cache: the cache received.
        expected: the layer's cache for one row and one position.
        larger: the layer's cache for two rows and more positions.
        batch_size: int or `None`. The rows of the inputs, where known.

    Raises:
        ValueError: if it was made by another layer or for other rows.
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
        shape = tuple(getattr(leaf, "shape", ()))
        fixed = [
            a if a == b else None for a, b in zip(tuple(one.shape), tuple(two.shape))
        ]
        matches = (
            hasattr(leaf, "dtype")
            and dtype_name(leaf) == dtype_name(one)
            and _same_shape(shape, tuple(fixed))
        )
        if not matches:
            raise ValueError(
                f"`cache` was not made by layer '{layer_name}': one of its "
                f"tensors is a {describe(leaf)}, where this layer's have dtype "
                f"{dtype_name(one)} and shape {tuple(fixed)} (None: any size). "
                "Create it with `create_cache` of the layer you are calling, "
                "and again after its dtype policy has changed."
            )
        rows = shape[0] if shape else None
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
        hasattr(b, "shape")
        and hasattr(b, "dtype")
        and _same_shape(tuple(a.shape), tuple(b.shape))
        and dtype_name(a) == dtype_name(b)
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


def _same_shape(first: tuple, second: tuple) -> bool:
    """Returns whether two shapes agree; `None` is a size that is not known."""
    return len(first) == len(second) and all(
        a is None or b is None or a == b for a, b in zip(first, second)
    )


def check_rewind_indices(from_index: Index, to_index: Index) -> None:
    """Checks the indices of `can_rewind`.

    Args:
        from_index: how many positions the cache has processed.
        to_index: how many of them are to be kept.

    Raises:
        ValueError: if one is not an integer, or not `from_index >= to_index >= 0`.
    """
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
