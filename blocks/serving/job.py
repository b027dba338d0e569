"""A request as the server sees it: what it asks for, and how far it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from attention.contract import Cache
from blocks.generation.endings import Endings
from blocks.generation.outputs import Completion, completions, joined
from blocks.generation.processors import HostProcessor
from blocks.generation.running_batch import BROKEN_LOGITS, Block, completed_rows
from blocks.generation.sampling import Sampling
from blocks.generation.texts import TextPieces
from blocks.serving.request import Request


@dataclasses.dataclass
class Prefill:
    """How far the prefill of a prompt is.

    Attributes:
        cache: of one row.
        done: int. How many tokens it holds.
        shared: int. Where a beginning ends that other prompts have, too; 0 if there is
            none.
    """

    cache: Cache = None
    done: int = 0
    shared: int = 0


@dataclasses.dataclass
class Job:
    """A request, and how far it is.

    Attributes:
        request: tells whoever made it.
        tokens: `int32` array: the prompt.
        room: int. How many new tokens it may get.
        sampling: how its tokens are chosen.
        memory: what its processors know at first.
        endings: at what it ends.
        pieces: makes its text, or `None` for tokens.
        prefill: how far its prefill is.
        blocks: the new tokens so far.
        cancelled: bool. Whether it ends after the step that is going on.
    """

    request: Request
    tokens: np.ndarray
    room: int
    sampling: Sampling
    memory: Any
    endings: Endings
    pieces: TextPieces | None
    prefill: Prefill = dataclasses.field(default_factory=Prefill)
    blocks: list[Block] = dataclasses.field(default_factory=list)
    cancelled: bool = False

    @property
    def grammar(self) -> HostProcessor | None:
        """Returns what it keeps to, or `None`."""
        return next(iter(self.sampling.hosted.values()), None)

    def add(self, block: Block) -> bool:
        """Gives the request new tokens; returns whether it ends with them.

        Raises:
            ValueError: if no token could be chosen.
        """
        (new,) = block.rows()
        if (new < 0).any():
            raise ValueError(
                "The model's logits became NaN or infinite, so no next token could be "
                f"chosen. {BROKEN_LOGITS}"
            )
        self.blocks.append(block)
        completed_rows(self.sampling, block, self.endings)
        stopped = self.endings.reached([new])[0]
        if self.pieces is not None:
            piece = self.pieces.add([new])[0]
            if piece:
                self.request.add(piece)
        elif not self.endings.stop:
            self.request.add(new)
        made = sum(int(x.valid.sum()) for x in self.blocks)
        at_stop = int(new[-1]) in self.endings.stop_token_ids
        ended = bool(stopped) or at_stop or bool(self.endings.completed)
        return ended or made >= self.room

    def finish(self, reason: str | None = None, error: Exception | None = None) -> None:
        """Gives the request its answer, or the error instead.

        An answer that can't be made, as its bytes are no text, is an error, too.
        """
        answer = None
        try:
            answer = None if error else self._answer(reason)
        except Exception as failed:
            error = failed
        self.request.finish(answer, error)

    def _answer(self, reason: str | None) -> Completion:
        text = None
        if self.pieces is not None:
            last = self.pieces.add([self.tokens[:0]], finished=True)[0]
            if last:
                self.request.add(last)
            text = self.pieces.given
        whole, length = joined(self.blocks, 1), len(self.tokens)
        (answer,) = completions(whole, [length], self.endings, text, reason)
        if self.pieces is None and self.endings.stop:
            # Tokens that may have become a stop string were held back.
            self.request.add(answer.token_ids)
        return answer
