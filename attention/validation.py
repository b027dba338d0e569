"""Checks of arguments, and the words for what was received."""

from __future__ import annotations

import contextvars
import numbers
from typing import Any

import keras
import numpy as np
from keras import ops, tree

# Whether a layer runs on stand-ins for tensors whose sizes are not known.
MADE_UP_SIZES: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "keras_transformer_blocks_made_up_sizes", default=False
)


def describe(value: Any) -> str:
    """Describes a value for an error message: types and shapes, no contents.

    Args:
        value: anything.

    Returns:
        A short string.

    Example:

    >>> import numpy as np
    >>> from attention import describe
    >>> describe({"key": np.zeros((2, 4), "float32")})
    "{'key': float32 tensor of shape (2, 4)}"
    """
    if value is None or isinstance(value, (bool, numbers.Number, str)):
        return repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{dtype_name(value)} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        inner = ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items())
        return f"{{{inner}}}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(describe(v) for v in value[:3])
        more = f", ... {len(value)} in all" if len(value) > 3 else ""
        return f"{type(value).__name__}({shown}{more})"
    return f"an instance of {type(value).__name__}"


def dtype_name(x: Any) -> str:
    """The name of a tensor's dtype, also where it is none of Keras's."""
    try:
        return keras.backend.standardize_dtype(x.dtype)
    except ValueError:
        return str(x.dtype)


def check_positive_int(name: str, value: Any) -> int:
    """Returns an argument as an int, or says that it must be a positive one.

    Args:
        name: str. The name of the argument, for the message.
        value: what was received.

    Returns:
        An int.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is not positive.

    Example:

    >>> from attention import check_positive_int
    >>> check_positive_int("num_heads", 8)
    8
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"`{name}` must be a positive integer. Received: {name}={describe(value)}"
        )
    if value <= 0:
        raise ValueError(
            f"`{name}` must be a positive integer. Received: {name}={value}"
        )
    return int(value)


def check_fraction(name: str, value: Any) -> float:
    """Returns an argument as a float, or says that it must be in `[0, 1)`.

    Args:
        name: str. The name of the argument, for the message.
        value: what was received.

    Returns:
        A float.

    Raises:
        ValueError: if it is no number of at least 0 and below 1.

    Example:

    >>> from attention import check_fraction
    >>> check_fraction("dropout", 0.1)
    0.1
    """
    if not isinstance(value, (int, float, np.number)) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number of at least 0 and below 1. Received: "
            f"{name}={describe(value)}"
        )
    return float(value)


def check_soft_cap(value: Any) -> float | None:
    """Returns a positive number or `None`, or says what may be given."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            "`logit_soft_cap` must be a number or None, which means no cap. "
            f"Received: logit_soft_cap={describe(value)}"
        )
    if value <= 0:
        raise ValueError(
            "`logit_soft_cap` must be positive: logits are kept between it and its "
            f"negative. Received: logit_soft_cap={value}"
        )
    return float(value)


def refuse_arguments(layer: Any, given: dict[str, Any], **reasons: str) -> None:
    """Says so when a layer gets an argument that it has no use for.

    Args:
        layer: the layer.
        given: the arguments that it would hand on.
        **reasons: why it can't use them, by their names.

    Raises:
        TypeError: if so.
    """
    for name, reason in reasons.items():
        if name in given:
            raise TypeError(
                f"`{type(layer).__name__}` takes no `{name}`: {reason}. Received: "
                f"{name}={describe(given[name])}"
            )


def check_rewind_indices(from_index: Any, to_index: Any) -> None:
    """Says so when a cache can't be asked to go from one index back to another.

    Args:
        from_index: how many positions the cache has absorbed.
        to_index: how many of them are to be kept.

    Raises:
        ValueError: if one is no integer, or not `from_index >= to_index >= 0`.
    """
    known = all(
        isinstance(x, (int, np.integer)) and not isinstance(x, bool)
        for x in (from_index, to_index)
    )
    if not known or not from_index >= to_index >= 0:
        raise ValueError(
            "`from_index`, how many positions the cache has absorbed, and `to_index`, "
            "how many of them are kept, must be integers with from_index >= to_index "
            f">= 0. Received: from_index={describe(from_index)}, "
            f"to_index={describe(to_index)}. Where rows differ, ask with the largest "
            "`from_index` and the smallest `to_index`."
        )


def static_size(x: Any, axis: int) -> int | None:
    """The size of an axis, or `None` where it is not known, or a stand-in.

    While Keras works out the outputs of a layer, unknown sizes are symbols on
    JAX. On torch they are made-up numbers: on the meta device, or on another
    one where the meta device can't compute something.
    """
    shape = getattr(x, "shape", ())
    if len(shape) <= axis or getattr(getattr(x, "device", None), "type", "") == "meta":
        return None
    if MADE_UP_SIZES.get() and not isinstance(x, keras.KerasTensor):
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def sequence_length(x: Any) -> Any:
    """The size of axis 1 of a batch of sequences.

    An int, or a tensor where a graph on TensorFlow takes any length, or `None`
    where nothing is computed but shapes.
    """
    length = static_size(x, 1)
    unknown = length is None and x.shape[1] is None
    return keras.ops.shape(x)[1] if unknown else length


def standardize_index(cache_update_index: Any, batch_size: int | None) -> Any:
    """Checks a `cache_update_index` and makes Python ints of NumPy ones.

    Args:
        cache_update_index: int, integer scalar tensor or integer tensor of
            shape `(batch_size,)`.
        batch_size: int or `None`. The number of rows, where it is known.

    Returns:
        An `int` where the value is known without looking into a tensor,
        otherwise an `int32` tensor of rank 0 or 1.

    Raises:
        TypeError: for anything that is no integer.
        ValueError: for a negative index or one of another shape.
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
                f"absorbed; it can't be negative. Received: {index}"
            )
        return int(index)
    if isinstance(index, (list, tuple)):
        index = np.asarray(index)
    if isinstance(index, np.ndarray) and index.dtype.kind == "i" and (index < 0).any():
        raise ValueError(
            "`cache_update_index` holds the numbers of positions the rows have "
            "absorbed; they can't be negative. Received: cache_update_index="
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


def check_sequence_shape(layer_name: str, shape: Any, what: str = "inputs") -> None:
    """Says so when a layer is built for anything but `(batch, length, width)`.

    Args:
        layer_name: str. The layer.
        shape: tuple. The shape of its inputs.
        what: str. What these inputs are called.

    Raises:
        ValueError: if there is another number of axes, or no width.
    """
    if len(shape) != 3 or shape[-1] is None:
        raise ValueError(
            f"Layer '{layer_name}' needs {what} of shape (batch, length, width) with "
            f"a known width. Received: shape {tuple(shape)}"
        )


def check_padding_mask(
    layer_name: str, padding_mask: Any, inputs: Any, what: str = "padding_mask"
) -> None:
    """Says so when a padding mask is not one of these inputs.

    A mask of other sizes might broadcast, to something nobody meant.
    """
    shape = getattr(padding_mask, "shape", None)
    pairs = [(static_size(padding_mask, i), static_size(inputs, i)) for i in (0, 1)]
    fits = shape is not None and len(shape) == 2
    if fits and all(None in pair or pair[0] == pair[1] for pair in pairs):
        return
    raise ValueError(
        f"`{what}` of layer '{layer_name}' must be a boolean tensor of "
        "shape (batch, length) that marks the real tokens of these inputs, and "
        f"of no others. Received: {what}={describe(padding_mask)}, inputs="
        f"{describe(inputs)}"
    )


def check_cache(
    layer_name: str, cache: Any, expected: Any, larger: Any, batch_size: int | None
) -> None:
    """Says so when a cache was made by another layer or for another batch size.

    What one layer's caches have in common is read off two of them: `expected`
    (one row, one position) and `larger` (two rows, more positions). The
    structure, ranks and dtypes are the same in all, and so are those
    dimensions that are the same in these two.

    Args:
        layer_name: str. The layer that was called, for the message.
        cache: the pytree that was received.
        expected: what the layer creates for one row and one position.
        larger: what the layer creates for two rows and more positions.
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
    """A layer returned another kind of cache than it got."""


def check_updated_cache(layer_name: str, cache: Any, outputs: Any) -> None:
    """Says so when a layer's `call` returned no cache like the one it got."""
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
    """Whether two shapes agree; `None` is a size that is not known."""
    return len(first) == len(second) and all(
        a is None or b is None or a == b for a, b in zip(first, second)
    )


def is_concrete(x: Any) -> bool:
    """Whether a tensor has values, rather than being part of what is traced."""
    try:
        ops.convert_to_numpy(x)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True
