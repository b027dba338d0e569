"""The compiled steps of generation: process tokens, decode a block, sample a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from attention import CacheScope, call_sites, grow_cache
from attention.contract import Cache, Index, Tensor, max_positions
from blocks.generation.backbone_inputs import backbone_inputs
from blocks.generation.backends.loop_kernels import LoopKernels
from blocks.generation.compilation import CompiledFunctions, StepKey
from blocks.generation.samplers import number_settings, sample_token
from blocks.generation.token_rows import tokenizer_size


class Engine:
    """The steps of generation with a causal language model, compiled as needed.

    It knows nothing of attention: it opens cache scopes around the backbone.
    Rows have positions of their own, so that prompts of different lengths give the
    same outputs as each alone.

    Args:
        task: a `blocks.CausalLM`.
        sampler: a `keras_hub.samplers.Sampler`; `None` means the one that the
            task was compiled with, at each call.

    Attributes:
        task: the task.
        sizes: the task's `GenerationSizes`.
        functions: a `CompiledFunctions`.
        sites: the backbone's cached layers, in call order.
        max_positions: int or `None`. How many positions the backbone knows.

    Raises:
        ValueError: if the backbone calls no cached layer.
    """

    def __init__(self, task: Any, sampler: Any = None) -> None:
        self.task = task
        self.sizes = task.generation_sizes
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
        """Returns the sampler that chooses tokens."""
        return self._sampler or self.task.sampler

    @property
    def known_tokens(self) -> int | None:
        """Returns how many of the model's first tokens the tokenizer has.

        `None` if it has all of them, or there is no tokenizer. Others are never chosen.
        """
        known = tokenizer_size(self.task.preprocessor)
        return known if known and known < self.task.output.shape[-1] else None

    def create_cache(self, batch_size: int, capacity: int) -> Cache:
        """Returns an empty KV cache for all of the backbone."""
        return tuple(x.create_cache(batch_size, capacity) for x in self.sites)

    def grow_cache(self, cache: Cache, capacity: int) -> Cache:
        """Returns a larger cache with the same contents."""
        return grow_cache(self.sites, cache, capacity)

    def process(
        self,
        cache: Cache | None,
        capacity: int,
        tokens: np.ndarray,
        index: Index,
        lengths: np.ndarray,
    ) -> tuple[Tensor, Cache]:
        """Processes the next tokens of each row: a prefill, or the tokens of a turn.

        Args:
            cache: the KV cache, whose memory is reused; `None` for a new one.
            capacity: int. The size of the cache.
            tokens: `int32` array of shape `(batch, width)`.
            index: int or `(batch,)` array: how many positions the cache holds.
            lengths: `int32` array `(batch,)`: how many tokens of each row count.

        Returns:
            The logits after the last token of each row, `(batch,
            vocabulary_size)`, and the cache. The logits of a row without tokens are
            undefined.
        """
        rows, longest = tokens.shape[0], int(lengths.max())
        few = self.sizes.few_tokens
        # A layer may need the whole prompt at once.
        whole = self.sites.whole_prompt
        chunk = capacity if whole else self.sizes.chunk_length(rows, capacity)
        if cache is not None and longest <= few:
            chunk = few
        # One width for all lengths, as each is compiled.
        width = few if chunk == few else -(-capacity // chunk) * chunk
        padded = np.zeros((rows, width), "int32")
        padded[:, :longest] = tokens[:, :longest]
        if cache is None:
            return self.functions.run(
                StepKey("prefill", rows, capacity, chunk),
                lambda _: self._make_prefill(capacity, chunk),
                (padded, lengths),
            )
        return self.functions.run(
            StepKey("process", rows, capacity, chunk),
            lambda _: self._make_process(chunk),
            (cache, padded, index, lengths),
            donate=(0,),
        )

    def decode(
        self,
        cache: Cache,
        capacity: int,
        token: Tensor,
        index: Index,
        room: Tensor,
        finished: Tensor,
        steps: Any,
        stops: np.ndarray,
    ) -> tuple:
        """Processes a token of each row and samples the next, up to `steps` times.

        Args:
            cache: the KV cache. Its memory is reused.
            capacity: int. The size of the cache.
            token: `int32` `(batch,)`: the last token of each row.
            index: `int32` `(batch,)`, or `()` where all rows have one position,
                which is faster.
            room: `int32` `(batch,)`: how many more tokens each row may get.
            finished: boolean `(batch,)`: rows that get none.
            steps: int, at most `sizes.block_steps`.
            stops: `int32` array: the tokens at which rows end.

        Returns:
            `(cache, token, index, room, finished, tokens, valid)`: the first five
            after these steps; the new tokens, `(batch, block_steps)`, -1 where a row's
            logits were NaN or infinite; and which of these are part of the rows.
        """
        settings, known = number_settings(self.sampler), self.known_tokens
        return self.functions.run(
            StepKey("decode", token.shape[0], capacity, variant=known),
            lambda sampler: self.make_decode(sampler, known),
            (cache, token, index, room, finished, steps, stops, settings),
            donate=(0,),
            sampler=self.sampler,
        )

    def sample(self, logits: Tensor) -> Tensor:
        """Samples a token for each row of logits; -1 where they are NaN or infinite."""
        known = self.known_tokens

        def make(sampler: Any) -> Callable:
            return lambda logits, settings: sample_token(
                sampler, logits, settings, known
            )

        key = StepKey("sample", logits.shape[0], variant=known)
        args = (logits, number_settings(self.sampler))
        return self.functions.run(key, make, args, sampler=self.sampler)

    def step(
        self,
        cache: Cache,
        capacity: int | None,
        token: Tensor,
        index: Index,
        max_length: Tensor,
        donate: bool,
    ) -> tuple[Tensor, Cache]:
        """Processes one token of each row; returns the logits and the cache."""

        def make(_: Any) -> Callable:
            def step(
                cache: Cache, token: Tensor, index: Index, max_length: Tensor
            ) -> tuple[Tensor, Cache]:
                fits = (index < max_length)[:, None]
                hidden, cache = self.forward(cache, token[:, None], index, fits, donate)
                logits = self.task.compute_logits(hidden)[:, 0]
                # A compiled step can raise no error; NaN is better than wrong logits.
                return ops.where(fits, logits, float("nan")), cache

            return step

        return self.functions.run(
            StepKey("decode_step", token.shape[0], capacity, variant=donate),
            make,
            (cache, token, index, max_length),
            donate=(0,) if donate else (),
        )

    def forward(
        self,
        cache: Cache,
        tokens: Tensor,
        index: Index,
        mask: Tensor,
        donate: bool = True,
    ) -> tuple[Tensor, Cache]:
        """Returns the hidden states of the next tokens, and the updated cache."""
        with CacheScope(cache, index, mask, donate) as scope:
            hidden = self.hidden_states(tokens, mask)
        return hidden, scope.cache

    def hidden_states(self, tokens: Tensor, padding_mask: Tensor) -> Tensor:
        """Returns the backbone's outputs, of shape `(batch, length, hidden_dim)`."""
        backbone = self.task.backbone
        padding_mask = ops.cast(padding_mask, "int32")
        return backbone(backbone_inputs(backbone, tokens, padding_mask))

    def _make_prefill(self, capacity: int, chunk: int) -> Callable:
        process = self._make_process(chunk)

        def prefill(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Cache]:
            cache = self.create_cache(tokens.shape[0], capacity)
            return process(cache, tokens, ops.zeros((), dtype="int32"), lengths)

        return prefill

    def _make_process(self, chunk: int) -> Callable:
        task = self.task
        output = task.backbone.output

        def process(
            cache: Cache, tokens: Tensor, index: Index, lengths: Tensor
        ) -> tuple[Tensor, Cache]:
            rows = tokens.shape[0]
            longest = ops.max(lengths)

            def more(start: Tensor, *_: Any) -> Tensor:
                return start < longest

            def process_chunk(start: Tensor, cache: Cache, last: Tensor) -> tuple:
                part = ops.slice(tokens, (0, start), (rows, chunk))  # (rows, chunk)
                left = (lengths - start)[:, None]
                mask = ops.arange(chunk, dtype="int32")[None] < left
                hidden, cache = self.forward(cache, part, index + start, mask)
                # Only the last token's hidden state goes to the vocabulary.
                ends = ops.logical_and(left > 0, left <= chunk)[..., None]
                place = ops.clip(left - 1, 0, chunk - 1)[..., None]
                here = ops.take_along_axis(hidden, place, axis=1)  # (rows, 1, dim)
                return start + chunk, cache, ops.where(ends, here, last)

            last = ops.zeros((rows, 1, output.shape[-1]), dtype=output.dtype)
            start = ops.zeros((), dtype="int32")
            _, cache, last = ops.while_loop(more, process_chunk, (start, cache, last))
            return task.compute_logits(last)[:, 0], cache

        return process

    def make_decode(self, sampler: Any, known: int | None) -> Callable:
        """Returns the function that `decode` compiles."""
        task = self.task
        block_steps = self.sizes.block_steps
        kernels = LoopKernels(self.functions.layers)

        def decode(
            cache: Cache,
            token: Tensor,
            index: Tensor,
            room: Tensor,
            finished: Tensor,
            steps: Tensor,
            stops: Tensor,
            settings: dict[str, Tensor],
        ) -> tuple:
            shape = (token.shape[0], block_steps)
            rows_differ = len(index.shape) == 1
            matrices = kernels.before_loop()

            def more(step: Tensor, cache: Cache, *state: Tensor) -> Tensor:
                unfinished = ops.logical_not(ops.all(state[3]))
                return ops.logical_and(step < steps, unfinished)

            def body(
                step: Tensor,
                cache: Cache,
                token: Tensor,
                index: Tensor,
                room: Tensor,
                finished: Tensor,
                tokens: Tensor,
                valid: Tensor,
            ) -> tuple:
                active = ops.logical_not(finished)
                new = active[:, None]
                with kernels.within_loop(matrices):
                    hidden, cache = self.forward(cache, token[:, None], index, new)
                    logits = task.compute_logits(hidden)[:, 0]
                sampled = sample_token(sampler, logits, settings, known)
                index = index + (ops.cast(active, "int32") if rows_differ else 1)
                tokens = ops.slice_update(tokens, (0, step), sampled[:, None])
                valid = ops.slice_update(valid, (0, step), new)
                done = ops.logical_or(room <= 1, is_any(sampled, stops))
                finished = ops.logical_or(finished, done)
                # -1, for NaN, is no token that can be embedded.
                finished = ops.logical_or(finished, sampled < 0)
                token = ops.maximum(sampled, 0)
                room = room - 1
                return step + 1, cache, token, index, room, finished, tokens, valid

            _, *state = sampler.run_loop(
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


def is_any(token: Tensor, stops: Tensor) -> Tensor:
    """Returns which tokens are among `stops`, a vector."""
    return ops.any(token[..., None] == stops, axis=-1)
