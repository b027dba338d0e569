"""The roles of projections, by which they are found in any layer."""

from __future__ import annotations

from typing import Any

import keras

ROLES = ("query", "key", "value", "input", "gate", "output")
FEED_FORWARD_ROLES = ("ffn_input", "ffn_gate", "ffn_output")


def declare_role(layer: Any, role: str) -> Any:
    """Says what a projection is for, and returns it.

    `CausalLM.enable_lora` finds projections by their roles, whatever their names. A
    layer of your own declares those of its projections when it makes them.

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
