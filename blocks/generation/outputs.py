"""Outputs of generation: what one call returns, and what a stream yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import tree

from blocks.generation.endings import Endings
from blocks.generation.running_batch import Block
from blocks.generation.sampling import Logprobs
from blocks.generation.texts import TextPieces


class Completion(NamedTuple):
    """The continuation of a prompt, with numbers: see `return_logprobs`.

    Attributes:
        text: str. What `generate` returns without `return_logprobs`; `None` where the
            prompts were tokens.
        token_ids: `int32` array: the new tokens. The last is the stop token, if the row
            ended at one. Tokens of a stop string are not among them.
        finish_reason: str. `"stop"`: at a stop token or string. `"length"`: at the length
            that was asked for. `None` of a piece.
        prompt_length: int. How many tokens the prompt has.
        logprobs: `Logprobs` of `token_ids`: `chosen`, `(length,)`; `best` and `best_ids`,
            `(length, return_logprobs)`, or `()` for 0. They are those of the model's
            logits, before processors and temperature. `None` where they were not asked
            for, or there is no token.
    """

    text: str | None
    token_ids: np.ndarray
    finish_reason: str | None
    prompt_length: int
    logprobs: Logprobs | None


def joined(blocks: list[Block], count: int) -> Block:
    """Returns the blocks of one generation of `count` rows as one."""
    if not blocks:
        empty = np.zeros((count, 0))
        return Block(empty.astype("int32"), empty.astype("bool"))
    return tree.map_structure(lambda *x: np.concatenate(x, axis=1), *blocks)


def completions(
    whole: Block,
    prompt_lengths: list[int],
    endings: Endings,
    texts: list[str] | None,
    reason: str | None = None,
) -> list[Completion]:
    """Returns the `Completion` of each row, of the `joined` blocks of one generation.

    `reason` is why they ended, if it was something else than their ending or limit.
    """
    found = []
    for row, (length, new) in enumerate(zip(prompt_lengths, whole.rows())):
        kept = endings.cut(row, new)
        places = np.flatnonzero(whole.valid[row])[: len(kept)]
        logprobs = None
        if whole.logprobs:
            logprobs = tree.map_structure(
                lambda x: x[row, places],  # noqa: B023
                whole.logprobs,
            )
        text = None if texts is None else texts[row]
        why = reason or endings.reason(row, new)
        found.append(Completion(text, kept, why, length, logprobs))
    return found


def stream_pieces(
    blocks: Iterable[Block],
    prompts: list[np.ndarray],
    preprocessor: Any,
    is_single: bool,
    endings: Endings,
    strip_prompt: bool = True,
) -> Iterator[Any]:
    """Yields text, or tokens if there is no preprocessor, as they are generated.

    The prompts are yielded first, unless `strip_prompt`. A single row is yielded without
    a list.
    """
    make = _tokens if preprocessor is None else _texts
    for rows in make(blocks, prompts, preprocessor, endings, strip_prompt):
        yield rows[0] if is_single else rows


def _tokens(
    blocks: Iterable[Block],
    prompts: list[np.ndarray],
    _: Any,
    endings: Endings,
    strip_prompt: bool,
) -> Iterator[list]:
    if not strip_prompt:
        yield prompts
    rows = [row[:0] for row in prompts]
    for block in blocks:
        if not endings.stop:
            yield block.rows()
            continue
        rows = [np.concatenate(pair) for pair in zip(rows, block.rows())]
        # Tokens that may become a stop string are held back.
        counts = [endings.count_given(i) for i in range(len(rows))]
        yield [row[:count] for row, count in zip(rows, counts)]
        rows = [row[count:] for row, count in zip(rows, counts)]
    if any(len(row) and i not in endings.kept for i, row in enumerate(rows)):
        yield [row[: 0 if i in endings.kept else None] for i, row in enumerate(rows)]


def _texts(
    blocks: Iterable[Block],
    prompts: list[np.ndarray],
    preprocessor: Any,
    endings: Endings,
    strip_prompt: bool,
) -> Iterator[list]:
    before = prompts if strip_prompt else ()
    pieces = TextPieces(len(prompts), preprocessor, endings.stop, before)
    if not strip_prompt:
        texts = pieces.add_prompts(prompts)
        if any(texts):
            yield texts
    for block in blocks:
        texts = pieces.add(block.rows())
        if any(texts):
            yield texts
    texts = pieces.add([row[:0] for row in prompts], finished=True)
    if any(texts):
        yield texts
