"""The context of a cached layer's call: its scope, padding mask and more.

There is one context, a frozen value in one context variable, as with Keras's
`StatelessScope`. Scopes and calls of cached layers change it for what runs inside.

Which padding mask the `call` of a cached layer gets is in ARCHITECTURE.md. It is then
the mask of the calls within it. `CachedLayer.__call__` handles the mask that is given
and that of the context (so that they are arguments also when `keras.RematScope` runs a
layer's `call` again), and `calls.in_context` the one that Keras attached to the inputs,
which it passes to `call` only.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attention.contract.types import Tensor

if TYPE_CHECKING:
    from attention.contract.scopes import RecordingScope, Scope


@dataclasses.dataclass(frozen=True)
class Context:
    """The state around the cached layers that are called now.

    Attributes:
        scope: the `Scope` that gives them their caches, or `None`.
        padding_mask: the mask of the enclosing call or scope, or `None`.
        segment_ids: the documents of packed rows, of the same, or `None`.
        scores: what a `ScoreScope` around them has collected, or `None`.
        donated: bool. Whether a cache policy may overwrite the cache it receives.
        dry_run: the outermost `RecordingScope` around them, or `None`.
        running: the cached layer whose `call` makes these calls, or `None`.
        made_up_sizes: bool. Whether the sizes of tensors are not the true ones.
    """

    scope: Scope | None = None
    padding_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    scores: list[tuple[Any, Tensor]] | None = None
    donated: bool = False
    dry_run: RecordingScope | None = None
    running: Any = None
    made_up_sizes: bool = False


_OUTSIDE = Context()
_CONTEXT: contextvars.ContextVar[Context] = contextvars.ContextVar(
    "keras_transformer_blocks", default=_OUTSIDE
)


def context() -> Context:
    """Returns the current context."""
    return _CONTEXT.get()


@contextlib.contextmanager
def change_context(**changes: Any) -> Iterator[None]:
    """Changes fields of the context for the code inside."""
    token = _CONTEXT.set(dataclasses.replace(_CONTEXT.get(), **changes))
    try:
        yield
    finally:
        _CONTEXT.reset(token)
