"""Packed rows: several documents in a row, none of which sees another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from keras import ops

from attention.contract.arguments import describe
from attention.contract.context import change_context
from attention.contract.sizes import is_tensor
from attention.contract.types import Tensor


@contextmanager
def SegmentScope(segment_ids: Tensor | None) -> Iterator[None]:
    """Tells the cached layers called inside which document each token belongs to.

    Rows of packed documents are trained as if each document had a row to itself:
    attention sees tokens of the same document only, recurrent states begin anew, and
    positions count from the start of the document. A model needs no line for that, as
    a cached layer that has no `segment_ids` of its own takes them from here. One that
    can't raises a `TypeError`. The scope is for whole sequences, without a cache.

    Args:
        segment_ids: `None`, for rows of one document, or an integer tensor of shape
            `(batch, length)`, of the model's inputs. A document's tokens are next to
            each other and have the same number, other than its neighbours'.

    Raises:
        TypeError: if `segment_ids` are no integers.
        ValueError: if they are of another rank.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from attention import Retention, SegmentScope
    >>> layer = Retention(num_heads=2)
    >>> x = np.random.normal(size=(1, 5, 16)).astype("float32")
    >>> with SegmentScope(np.array([[1, 1, 1, 2, 2]])):
    ...     packed = layer(x)
    >>> bool(ops.all(ops.isclose(packed[:, 3:], layer(x[:, 3:]), atol=1e-5)))
    True

    Reference:

    - [Krell et al., 2021](https://arxiv.org/abs/2107.02027)
    """
    with change_context(segment_ids=check_segments(segment_ids)):
        yield


def check_segments(segment_ids: Any, where: str = "") -> Any:
    """Returns segment ids as a tensor, or raises an error if they are none."""
    if segment_ids is None:
        return None
    if isinstance(segment_ids, (list, tuple)):
        segment_ids = np.asarray(segment_ids)
    received = f"Received{where}: segment_ids={describe(segment_ids)}"
    if not is_tensor(segment_ids) or "int" not in str(segment_ids.dtype):
        raise TypeError(f"`segment_ids` must be an integer tensor. {received}")
    if len(segment_ids.shape) != 2:
        raise ValueError(
            "`segment_ids` must be of shape (batch, length), a number for each token. "
            + received
        )
    return segment_ids


def segment_starts(segment_ids: Tensor) -> Tensor:
    """Returns which tokens are the first of their document, `(batch, length)`."""
    first = ops.ones_like(segment_ids[:, :1], dtype="bool")
    changes = ops.not_equal(segment_ids[:, 1:], segment_ids[:, :-1])
    return ops.concatenate([first, changes], axis=1)


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Returns the position of each token in its document, `int32`, `(batch, length)`.

    Example:

    >>> import numpy as np
    >>> from attention.contract import segment_positions
    >>> np.array(segment_positions(np.array([[3, 3, 4, 4, 4]]))).tolist()
    [[0, 1, 0, 1, 2]]
    """
    segment_ids = ops.convert_to_tensor(segment_ids)
    starts = ops.reshape(segment_starts(segment_ids), (-1,))
    # A number for each document of the batch, ascending, and its first token.
    documents = ops.cumsum(ops.cast(starts, "int32"))
    first = ops.searchsorted(documents, documents, side="left")
    places = ops.arange(ops.shape(documents)[0], dtype="int32")
    positions = places - ops.cast(first, "int32")
    return ops.reshape(positions, ops.shape(segment_ids))


def same_segment(queries: Tensor, keys: Tensor) -> Tensor:
    """Returns whether a query and a key are of one document, `(batch, queries, keys)`."""
    return queries[:, :, None] == keys[:, None, :]
