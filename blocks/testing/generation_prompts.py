"""Prompts for the checks of generation, and the rows that come back."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import numpy as np

from attention.contract.arguments import describe
from attention.contract.cached_model import call_sites, max_positions
from attention.testing.backends import to_numpy

Rows = list[list[int]]

# Of the default prompts: a single token, some past 16, two of the same length.
_LENGTHS = (5, 18, 1, 18)


def pad(rows: Rows, width: int | None = None) -> dict[str, np.ndarray]:
    """Returns tokens as a model takes them, padded on the right."""
    shape = (len(rows), width or max(map(len, rows)))
    padded = {key: np.zeros(shape, "int32") for key in ("token_ids", "padding_mask")}
    for i, row in enumerate(rows):
        padded["token_ids"][i, : len(row)] = row
        padded["padding_mask"][i, : len(row)] = 1
    return padded


def max_length(lm: Any) -> int | None:
    """Returns how many positions a model knows, or `None` if that is not known."""
    backbone = getattr(lm, "backbone", lm)
    limits = [getattr(backbone, "max_sequence_length", None)]
    # The model need not be made of our cached layers.
    with contextlib.suppress(TypeError, ValueError):
        limits.append(max_positions(call_sites(backbone)))
    return min((x for x in limits if x), default=None)


def read_prompts(
    prompts: Any, vocabulary_size: int, limit: int | None, new_tokens: int, seed: int
) -> Rows:
    """Returns the prompts as lists, or random ones of different lengths."""
    room = None if limit is None else limit - new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"The model knows {limit} positions, which is too few for a prompt and "
            f"{new_tokens} new tokens. Pass a smaller `max_new_tokens`."
        )
    if prompts is None:
        rng = np.random.default_rng(seed)
        lengths = [length if room is None else min(length, room) for length in _LENGTHS]
        # 0 is what pads, in many models.
        low = min(1, vocabulary_size - 1)
        return [rng.integers(low, vocabulary_size, n).tolist() for n in lengths]
    wanted = "`prompts` must be a list of prompts, each a list of token ids"
    try:
        rows = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:
        raise TypeError(f"{wanted}. Received: prompts={describe(prompts)}") from None
    if not rows or not all(rows):
        raise ValueError(f"{wanted}, at least one. Received: prompts={prompts!r}")
    for row in rows:
        if not 0 <= min(row) <= max(row) < vocabulary_size:
            raise ValueError(
                f"`prompts` must be within the model's vocabulary of {vocabulary_size} "
                f"tokens. Received tokens from {min(row)} to {max(row)}."
            )
        if room is not None and len(row) > room:
            raise ValueError(
                f"The model knows {limit} positions, so with {new_tokens} new tokens "
                f"a prompt may have {room}. `prompts` has one of {len(row)}."
            )
    return rows


def read_outputs(outputs: Any, rows: int) -> Rows | None:
    """Returns the real tokens of each row, or `None` if the outputs are malformed."""
    keys = ("token_ids", "padding_mask")
    if not isinstance(outputs, dict) or not set(keys) <= set(outputs):
        return None
    tokens, mask = (np.asarray(to_numpy(outputs[key])) for key in keys)
    if tokens.shape != mask.shape or tokens.ndim != 2 or len(tokens) != rows:
        return None
    mask = mask.astype(bool)
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        return None
    return [row[real].tolist() for row, real in zip(tokens, mask)]
