"""The compiled steps of generation: absorb tokens, decode a block, verify a draft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from attention import CacheScope, call_sites, grow_cache
from attention.contract import max_positions
from blocks.backbone_inputs import backbone_inputs
from blocks.generation.backends.loop_kernels import LoopKernels
from blocks.generation.compilation import CompiledFunctions, sampler_variables
from blocks.generation.sampler_contents import LoopSampler
from blocks.generation.sampler_settings import number_settings, with_settings
from blocks.generation.state import chunk_length

# The most decode steps of one compiled call. Between two calls the host sees
# the new tokens, stops if all rows are done, and grows the cache if it is full.
BLOCK_STEPS = 32
# A turn of a few tokens is not padded to a whole chunk.
FEW_TOKENS = 4


class Engine:
    """The steps of generation with a causal language model, compiled as needed.

    It knows nothing of attention: it opens cache scopes around the backbone.
    Rows stand at positions of their own, so prompts of different lengths give
    what each gives alone.

    Args:
        task: a `blocks.CausalLM`.
        sampler: a `keras_hub.samplers.Sampler`; `None` means the one that the
            task was compiled with, at each call.

    Attributes:
        task: the task.
        functions: a `CompiledFunctions`.
        sites: the backbone's cached layers, in call order.
        max_positions: int or `None`. How many positions the backbone knows.

    Raises:
        ValueError: if the backbone calls no cached layer.
    """

    def __init__(self, task: Any, sampler: Any = None) -> None:
        self.task = task
        self._sampler = sampler
        self.functions = CompiledFunctions(task)
        self.sites = call_sites(task.backbone)
        if not self.sites:
            raise ValueError(
                f"`backbone` '{task.backbone.name}' calls no cached layer, so "
                "`generate` can't remember what it read. Make it of "
                "`attention.CachedLayer`s, for instance as a "
                "`blocks.CustomBackbone`."
            )
        self.max_positions = max_positions(self.sites)

    @property
    def sampler(self) -> Any:
        """The sampler that chooses tokens."""
        return self._sampler or self.task.sampler

    def create_cache(self, batch_size: int, capacity: int) -> tuple:
        """Returns an empty cache for all of the backbone."""
        return tuple(x.create_cache(batch_size, capacity) for x in self.sites)

    def grow_cache(self, cache: tuple, capacity: int) -> tuple:
        """Returns a larger cache with the same contents."""
        return grow_cache(self.sites, cache, capacity)

    def absorb(
        self,
        cache: tuple | None,
        capacity: int,
        tokens: np.ndarray,
        index: Any,
        lengths: np.ndarray,
    ) -> tuple[Any, tuple]:
        """Absorbs the next tokens of each row.

        Args:
            cache: `None` for a new one. The memory of another is reused.
            capacity: int. The size of the cache.
            tokens: `int32` array of shape `(batch, width)`.
            index: int or `(batch,)` array: how many positions were absorbed.
            lengths: `int32` array `(batch,)`: how many tokens of each row count.

        Returns:
            The logits behind the last token of each row, `(batch,
            vocabulary_size)`, and the cache. For a row of no tokens the logits
            mean nothing.
        """
        rows, longest = len(tokens), int(lengths.max())
        chunk = capacity if self.sites.whole_prompt else chunk_length(rows, capacity)
        if cache is not None and longest <= FEW_TOKENS:
            chunk = FEW_TOKENS
        # One width for all lengths, as each is compiled.
        width = FEW_TOKENS if chunk == FEW_TOKENS else -(-capacity // chunk) * chunk
        padded = np.zeros((rows, width), "int32")
        padded[:, :longest] = tokens[:, :longest]
        if cache is None:
            key = ("prefill", capacity, chunk)
            arguments: tuple = (padded, lengths)
            absorb = self.functions.get(
                key, lambda: self._make_prefill(capacity, chunk)
            )
        else:
            arguments = (cache, padded, index, lengths)
            absorb = self.functions.get(
                ("absorb", chunk), lambda: self._make_absorb(chunk), donate=(0,)
            )
        return absorb(*arguments)

    def decode(
        self,
        cache: tuple,
        token: Any,
        index: Any,
        room: Any,
        finished: Any,
        steps: Any,
        stops: Any,
    ) -> tuple:
        """Absorbs a token of each row and samples the next, up to `steps` times.

        Args:
            cache: the cache. Its memory is reused.
            token: `int32` `(batch,)`: the last token of each row.
            index: `int32` `(batch,)`, or `()` where all rows stand at one
                position, which is the faster way to write to a cache.
            room: `int32` `(batch,)`: how many more tokens each row may get.
            finished: boolean `(batch,)`: rows that get none.
            steps: int, at most `BLOCK_STEPS`.
            stops: `int32` array: the tokens at which rows end.

        Returns:
            `(cache, token, index, room, finished, tokens, valid)`: the first
            five moved on; the new tokens, `(batch, BLOCK_STEPS)`; and which of
            these are part of the rows.
        """
        sampler = self.sampler
        decode = self.functions.get("decode", self._make_decode, (0,), sampler)
        settings = number_settings(sampler)
        return decode(cache, token, index, room, finished, steps, stops, settings)

    def sample(self, logits: Any) -> Any:
        """Samples a token for each row of logits."""
        sampler = self.sampler
        sample = self.functions.get("sample", self._make_sample, (), sampler)
        return sample(logits, number_settings(sampler))

    def step(
        self, cache: tuple, token: Any, index: Any, max_length: Any, donate: bool
    ) -> tuple:
        """Absorbs one token of each row; returns the logits and the cache."""

        def make() -> Callable:
            def step(cache: Any, token: Any, index: Any, max_length: Any) -> Any:
                tokens = token[:, None]
                fits = (index < max_length)[:, None]
                hidden, cache = self.forward(cache, tokens, index, fits, donate)
                logits = self.task.compute_logits(hidden)[:, 0]
                # Better than logits that are silently wrong.
                return ops.where(fits, logits, float("nan")), cache

            return step

        step = self.functions.get(("step", donate), make, donate=(0,) if donate else ())
        return step(cache, token, index, max_length)

    def forward(
        self, cache: Any, tokens: Any, index: Any, mask: Any, donate: bool = True
    ) -> tuple[Any, tuple]:
        """The hidden states of the next tokens, and the updated cache."""
        with CacheScope(cache, index, mask, donate) as scope:
            hidden = self.hidden_states(tokens, mask)
        return hidden, scope.cache

    def hidden_states(self, tokens: Any, padding_mask: Any) -> Any:
        """The backbone's outputs for tokens."""
        backbone = self.task.backbone
        padding_mask = ops.cast(padding_mask, "int32")
        return backbone(backbone_inputs(backbone, tokens, padding_mask))

    def _make_prefill(self, capacity: int, chunk: int) -> Callable:
        absorb = self._make_absorb(chunk)

        def prefill(tokens: Any, lengths: Any) -> Any:
            cache = self.create_cache(tokens.shape[0], capacity)
            index = ops.zeros((), dtype="int32")
            return absorb(cache, tokens, index, lengths)

        return prefill

    def _make_absorb(self, chunk: int) -> Callable:
        task = self.task
        output = task.backbone.output

        def absorb(cache: Any, tokens: Any, index: Any, lengths: Any) -> Any:
            rows = tokens.shape[0]
            longest = ops.max(lengths)

            def more(start: Any, *_: Any) -> Any:
                return start < longest

            def absorb_chunk(start: Any, cache: Any, last: Any) -> Any:
                part = ops.slice(tokens, (0, start), (rows, chunk))
                left = (lengths - start)[:, None]
                mask = ops.arange(chunk, dtype="int32")[None] < left
                hidden, cache = self.forward(cache, part, index + start, mask)
                # Only the last token's hidden state goes to the vocabulary.
                ends = ops.logical_and(left > 0, left <= chunk)[..., None]
                place = ops.clip(left - 1, 0, chunk - 1)[..., None]
                here = ops.take_along_axis(hidden, place, axis=1)
                return start + chunk, cache, ops.where(ends, here, last)

            last = ops.zeros((rows, 1, output.shape[-1]), dtype=output.dtype)
            start = ops.zeros((), dtype="int32")
            _, cache, last = ops.while_loop(more, absorb_chunk, (start, cache, last))
            return task.compute_logits(last)[:, 0], cache

        return absorb

    def _make_sample(self) -> Callable:
        sampler = self.sampler

        def sample(logits: Any, settings: Any) -> Any:
            return sample_token(sampler, logits, settings)

        return sample

    def _make_decode(self) -> Callable:
        task, sampler = self.task, self.sampler
        kernels = LoopKernels(self.functions.layers)

        def decode(
            cache: Any,
            token: Any,
            index: Any,
            room: Any,
            finished: Any,
            steps: Any,
            stops: Any,
            settings: Any,
        ) -> Any:
            shape = (token.shape[0], BLOCK_STEPS)
            rows_differ = len(index.shape) == 1
            matrices = kernels.before_loop()

            def more(step: Any, cache: Any, *state: Any) -> Any:
                unfinished = ops.logical_not(ops.all(state[3]))
                return ops.logical_and(step < steps, unfinished)

            def body(
                step: Any,
                cache: Any,
                token: Any,
                index: Any,
                room: Any,
                finished: Any,
                tokens: Any,
                valid: Any,
            ) -> Any:
                active = ops.logical_not(finished)
                new = active[:, None]
                with kernels.within_loop(matrices):
                    hidden, cache = self.forward(cache, token[:, None], index, new)
                    logits = task.compute_logits(hidden)[:, 0]
                token = sample_token(sampler, logits, settings)
                index = index + (ops.cast(active, "int32") if rows_differ else 1)
                tokens = ops.slice_update(tokens, (0, step), token[:, None])
                valid = ops.slice_update(valid, (0, step), new)
                done = ops.logical_or(room <= 1, is_any(token, stops))
                finished = ops.logical_or(finished, done)
                room = room - 1
                return step + 1, cache, token, index, room, finished, tokens, valid

            variables = sampler_variables(sampler, task)
            _, *state = LoopSampler(variables).run_loop(
                more,
                body,
                model=task,
                loop_vars=(
                    ops.zeros((), dtype="int32"),
                    cache,
                    token,
                    index,
                    room,
                    finished,
                    ops.zeros(shape, dtype="int32"),
                    ops.zeros(shape, dtype="bool"),
                ),
            )
            return tuple(state)

        return decode


def sample_token(sampler: Any, logits: Any, settings: dict[str, Any]) -> Any:
    """Samples an `int32` token from each row of `(rows, vocabulary_size)`."""
    sampler = with_settings(sampler, settings)
    token = sampler.get_next_token(sampler.compute_probabilities(logits))
    return ops.cast(token, "int32")


def is_any(token: Any, stops: Any) -> Any:
    """Which tokens are among `stops`, a vector."""
    return ops.any(token[..., None] == stops, axis=-1)
