"""A request as the server sees it: what it asks for, and how far it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from keras import tree

from attention.contract import Cache
from blocks.generation.endings import Endings
from blocks.generation.outputs import Completion, completions, joined
from blocks.generation.processors import HostProcessor
from blocks.generation.running_batch import BROKEN_LOGITS, Block, completed_rows
from blocks.generation.sampling import Logprobs, Sampling
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
        top: how many likeliest tokens it wants to know, or `None` for no numbers.
        grammar: what it keeps to, or `None` for any text.
        prefill: how far its prefill is.
        blocks: the new tokens so far.
        told: int. How many of these were told.
        cancelled: bool. Whether it ends after the step that is going on.
    """

    request: Request
    tokens: np.ndarray
    room: int
    sampling: Sampling
    memory: Any
    endings: Endings
    pieces: TextPieces | None
    top: int | None = None
    grammar: HostProcessor | None = None
    prefill: Prefill = dataclasses.field(default_factory=Prefill)
    blocks: list[Block] = dataclasses.field(default_factory=list)
    told: int = 0
    cancelled: bool = False

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
        self.blocks.append(self._with_numbers(block))
        completed_rows(self.sampling, block, self.endings)
        stopped = self.endings.reached([new])[0]
        text = None if self.pieces is None else self.pieces.add([new])[0]
        if self.top is not None or text is None:
            # Tokens that may become a stop string are held back.
            count = self.endings.count_given(0) if self.endings.stop else len(new)
            self._tell(text, self.told + count)
        elif text:
            self.request.add(text)
        made = sum(int(x.valid.sum()) for x in self.blocks)
        at_stop = int(new[-1]) in self.endings.stop_token_ids
        ended = bool(stopped) or at_stop or bool(self.endings.completed)
        return ended or made >= self.room

    def _with_numbers(self, block: Block) -> Block:
        """Returns a block with the log-probabilities that were asked for."""
        if self.top is None:
            return Block(block.tokens, block.valid)
        chosen, *best = block.logprobs
        best = [x[..., : self.top] if self.top else () for x in best]
        return Block(block.tokens, block.valid, Logprobs(chosen, *best))

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
        text = last = None
        if self.pieces is not None:
            last = self.pieces.add([self.tokens[:0]], finished=True)[0]
            text = self.pieces.given[0]
        answer = self._completion(text, reason)
        self._tell(last, len(answer.token_ids))
        return answer

    def _completion(self, text: str | None, reason: str | None = None) -> Completion:
        """Returns what there is so far."""
        whole, length = joined(self.blocks, 1), len(self.tokens)
        texts = None if text is None else [text]
        (found,) = completions(whole, [length], self.endings, texts, reason)
        return found

    def _tell(self, text: str | None, count: int) -> None:
        """Tells the first `count` new tokens, as far as they were not told, or text.

        Where log-probabilities are asked for, it tells both.
        """
        found, new = self._completion(text), slice(self.told, count)
        tokens, self.told = found.token_ids[new], count
        if self.top is not None and (text or len(tokens)):
            logprobs = tree.map_structure(lambda x: x[new], found.logprobs)
            length = found.prompt_length
            self.request.add(Completion(text, tokens, None, length, logprobs))
        elif self.top is None and (text or (text is None and len(tokens))):
            self.request.add(tokens if text is None else text)
