"""The roles of projections and the axes of weights, as layers declare them."""

from __future__ import annotations

from typing import Any

import keras

ROLES = ("query", "key", "value", "input", "gate", "output")
FEED_FORWARD_ROLES = ("ffn_input", "ffn_gate", "ffn_output")
AXES = ("heads", "hidden", "experts", "vocabulary")

# Those of one weight.
Names = tuple[str | None, ...]


def declare_role(layer: Any, role: str) -> Any:
    """Says what a projection is for, and returns it.

    `CausalLM.enable_lora` finds projections by their roles, whatever their names, and
    `blocks.make_layout_map` and `blocks.Muon` know by them what the axes of the weights
    are. A layer of your own declares those of its projections when it makes them.

    Args:
        layer: a `keras.layers.Dense` or `keras.layers.EinsumDense`.
        role: str. In a mixer `"query"`, `"key"`, `"value"`, `"input"` (several of these
            at once), `"gate"` or `"output"`; in a feed-forward layer `"ffn_input"`,
            `"ffn_gate"` or `"ffn_output"`.

    Raises:
        ValueError: if there is no such role.

    Example:

    >>> import keras
    >>> from attention import declare_role
    >>> wq = declare_role(keras.layers.Dense(8, name="wq"), "query")
    """
    known = (*ROLES, *FEED_FORWARD_ROLES)
    if role not in known:
        raise ValueError(
            f"`role` must be one of {', '.join(known)}. Received: role={role!r}"
        )
    layer.projection_role = role
    return layer


def role_of(layer: keras.layers.Layer) -> str | None:
    """Returns the role that was declared, or `None`."""
    return getattr(layer, "projection_role", None)


def declare_axes(
    layer: Any, axes: dict[str, Names], num_heads: int | None = None
) -> Any:
    """Says what the axes of a layer's own weights are, and returns the layer.

    `blocks.make_layout_map` divides weights among devices along these axes. To
    `blocks.Muon` a weight of three axes, of `"experts"` or `"heads"` first, is a matrix
    for each of these. A layer of your own declares its weights of two axes or more when
    it makes them. Those of projections with a role (`declare_role`) and of embeddings
    are known.

    Args:
        layer: a `keras.layers.Layer`.
        axes: dict from names of weights to a tuple with an entry for each axis:
            `"heads"`, `"hidden"` (the feed-forward layer's), `"experts"`,
            `"vocabulary"`, or `None` where the axis is not to be divided.
        num_heads: int or `None`. How many heads an axis of `"heads"` holds; `None` means
            that the axis has an entry for each.

    Raises:
        ValueError: if there is no such axis.

    Example:

    >>> import keras
    >>> from attention import declare_axes
    >>> head = keras.layers.Dense(50, name="head")
    >>> head = declare_axes(head, {"kernel": (None, "vocabulary")})
    """
    for name, names in axes.items():
        unknown = [x for x in names if x is not None and x not in AXES]
        if unknown:
            raise ValueError(
                f"`axes` must name axes {', '.join(AXES)} or None. Received: "
                f"{name}={names!r}"
            )
    layer.axes_of_weights = {**declared_axes(layer), **axes}
    if num_heads is not None:
        layer.heads_of_axes = num_heads
    return layer


def declared_axes(layer: Any) -> dict[str, Names]:
    """Returns the axes that were declared, by the names of weights."""
    return getattr(layer, "axes_of_weights", {})


def declared_heads(layer: Any) -> int | None:
    """Returns how many heads an axis holds, or `None` where nobody said."""
    return getattr(layer, "heads_of_axes", None)
