"""The compiled steps of generation: process tokens, decode a block, sample a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops, tree

from attention import CachedLayer, CacheScope, call_sites
from attention.contract import Cache, Index, Tensor, all_layers, max_positions
from blocks.generation.backbone_inputs import backbone_inputs
from blocks.generation.backends.loop_kernels import LoopKernels
from blocks.generation.compilation import CompiledFunctions, StepKey
from blocks.generation.options import NO_OPTIONS, Options
from blocks.generation.sampling import (
    NO_MEMORY,
    Logprobs,
    Sampling,
    logprobs_of,
    zero_logprobs,
)
from blocks.generation.sources import Sources, encode, widened, with_tokens


class Engine:
    """The steps of generation with a causal language model, compiled as needed.

    It knows nothing of attention: it opens cache scopes around the backbone.
    Rows have positions of their own, so that prompts of different lengths give the
    same outputs as each alone.

    Args:
        task: a `blocks.CausalLM`.
        sampler: a `keras_hub.samplers.Sampler`; `None` means the one that the
            task was compiled with when a generation begins.

    Attributes:
        encoder: the model that reads sources, or `None`.
        decoder: the model that is called on tokens: the backbone, or its decoder.
        sites: its cached layers, in call order.
        max_positions: int or `None`. How many positions it knows.
        max_source_positions: int or `None`. How many positions the encoder knows.
    """

    def __init__(self, task: Any, sampler: Any = None) -> None:
        self.task = task
        self.sizes = task.generation_sizes
        self._sampler = sampler
        self.functions = CompiledFunctions(task)
        self.encoder, self.decoder = task.encoder, task.decoder
        self.sites = call_sites(self.decoder)
        if not self.sites:
            raise ValueError(
                f"`backbone` '{self.decoder.name}' calls no cached layer, so "
                "`generate` can't remember what it read. Make it of "
                "`attention.CachedLayer`s, for instance as a "
                "`blocks.CustomBackbone`."
            )
        self.max_positions = max_positions(self.sites)
        self.max_source_positions = None
        if self.encoder is not None:
            layers = all_layers(self.encoder)
            known = [x for x in layers if isinstance(x, CachedLayer)]
            self.max_source_positions = max_positions(tuple(known))

    def sampling(self, options: Options = NO_OPTIONS) -> Sampling:
        """Returns how a generation that begins now chooses tokens."""
        return Sampling(self._sampler or self.task.sampler, self.task, options)

    def create_cache(
        self, batch_size: int, capacity: int, source_length: int | None = None
    ) -> Cache:
        """Returns an empty KV cache for all of the decoder."""
        sizes = (batch_size, capacity, source_length)
        return tuple(x.create_cache(*sizes) for x in self.sites)

    def process(
        self,
        cache: Cache | None,
        capacity: int,
        tokens: Any,
        index: Index,
        lengths: np.ndarray,
    ) -> tuple[Tensor, Cache]:
        """Processes the next tokens of each row: a prefill, or the tokens of a turn.

        The cache, whose memory is reused, is `None` for a new one. `tokens` are of shape
        `(batch, width)`, of which `lengths`, `(batch,)`, count; or a dict of these and of
        what else a prompt has.

        Returns:
            The logits after the last token of each row, `(batch, vocabulary_size)`, and
            the cache. The logits of a row without tokens are undefined.
        """
        rows, longest = len(lengths), int(lengths.max())
        few = self.sizes.few_tokens
        # A layer may need the whole prompt at once.
        whole = self.sites.whole_prompt
        chunk = capacity if whole else self.sizes.chunk_length(rows, capacity)
        if cache is not None and longest <= few:
            chunk = few
        elif cache is not None and not whole:
            chunk = self.sizes.further_chunk(chunk, longest)
        # One width for all lengths, as each is compiled.
        width = few if chunk == few else -(-capacity // chunk) * chunk
        given = tree.map_structure(lambda x: widened(x[:, :longest], width), tokens)
        beside = tuple(tokens) if isinstance(tokens, dict) else None
        step = "prefill" if cache is None else "process"
        return self.functions.run(
            StepKey(step, rows, capacity, chunk, beside),
            lambda _: self._make_process(capacity, chunk),
            (() if cache is None else cache, given, index, lengths),
            donate=(0,),
        )

    def score(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        top: int,
        sources: Sources | None = None,
    ) -> Logprobs:
        """Returns the log-probabilities of each token after the ones before it.

        `tokens` are of shape `(batch, width)`, of which `lengths`, `(batch,)`, count. Those
        of token `i + 1` are at place `i`; what is behind a row has no meaning. A row's last
        token is not processed.
        """
        lengths = np.maximum(lengths - 1, 1)
        rows, longest = len(lengths), int(lengths.max())
        capacity = self.sizes.round_up_capacity(longest)
        # Logits of all positions of a chunk are in memory: they are short.
        chunk = max(1, self.sizes.chunk_length(rows, capacity) // 4)
        chunk = capacity if self.sites.whole_prompt else chunk
        width = -(-capacity // chunk) * chunk
        following = widened(tokens[:, 1 : longest + 1], width)
        given = with_tokens(widened(tokens[:, :longest], width), sources, self)
        return self.functions.run(
            StepKey("score", rows, capacity, chunk, variant=top),
            lambda _: self._make_score(capacity, chunk, top),
            (encode(self, sources, capacity) or (), given, following, lengths),
        )

    def decode(
        self, cache: Cache, capacity: int, sampling: Sampling, *state: Any
    ) -> tuple:
        """Processes a token of each row and samples the next, up to `steps` times.

        `state` is the last `token` of each row; `index`, a scalar where all rows have one
        position, which is faster; `room`: how many more tokens each row may get;
        `memory`, from `sampling.begin`; `finished`: rows that get none; `steps`, at most
        `sizes.block_steps`; and `stops`, the tokens at which rows end. All but the last
        two, and the memory, are `(batch,)`.

        Returns:
            `(cache, token, index, room, memory, finished, tokens, valid, logprobs)`: the
            first six after these steps; the new tokens, `(batch, block_steps)`, -1 where
            a row's logits were NaN or infinite; which of these are part of the rows; and
            their `Logprobs`, if they are asked for.
        """
        return self.functions.run(
            StepKey("decode", state[0].shape[0], capacity),
            self.make_decode,
            (cache, *state, sampling.settings),
            donate=(0,),
            sampling=sampling,
        )

    def sample(
        self,
        logits: Tensor,
        sampling: Sampling,
        lengths: np.ndarray,
        memory: Any = NO_MEMORY,
    ) -> tuple[Tensor, Any, Any]:
        """Chooses a token for each row of logits, as `Sampling.choose`."""
        width = memory.token_ids.shape[1] - 1 if sampling.processors else None
        return self.functions.run(
            StepKey("sample", logits.shape[0], width),
            lambda sampling: sampling.choose,
            (logits, lengths, sampling.settings, memory),
            sampling=sampling,
        )

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
        return self.functions.run(
            StepKey("decode_step", token.shape[0], capacity, variant=donate),
            lambda _: self._make_step(donate),
            (cache, token, index, max_length, np.int32(1)),
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
        args = (cache, tokens, index, mask, donate)
        return self.functions.call_model(self._forward, *args)

    def _forward(
        self, cache: Cache, tokens: Tensor, index: Index, mask: Tensor, donate: bool
    ) -> tuple[Tensor, Cache]:
        with CacheScope(cache, index, mask, donate) as scope:
            hidden = self.hidden_states(tokens, mask)
        return hidden, scope.cache

    def hidden_states(self, tokens: Tensor, padding_mask: Tensor) -> Tensor:
        """Returns the backbone's outputs, of shape `(batch, length, hidden_dim)`."""
        padding_mask = ops.cast(padding_mask, "int32")
        return self.decoder(backbone_inputs(self.decoder, tokens, padding_mask))

    def _over_chunks(
        self,
        tokens: Tensor,
        lengths: Tensor,
        chunk: int,
        index: Index,
        cache: Cache,
        found: Any,
        take: Callable[[Tensor, Tensor, Tensor, Any], Any],
    ) -> tuple[Cache, Any]:
        """Processes tokens chunk by chunk, in a loop that is compiled once.

        `take(start, left, hidden, found)` returns what is `found` so far: `left`,
        `(rows, 1)`, is how many tokens of each row were left at the chunk's start, and
        `hidden` are the chunk's hidden states.

        Returns:
            The cache, and what was found.
        """
        longest = ops.max(lengths)

        def more(start: Tensor, *_: Any) -> Tensor:
            return start < longest

        def process_chunk(start: Tensor, cache: Cache, found: Any) -> tuple:
            # Tokens are (rows, chunk) then.
            part = tree.map_structure(lambda x: _part(x, start, chunk), tokens)
            left = (lengths - start)[:, None]
            mask = ops.arange(chunk, dtype="int32")[None] < left
            hidden, cache = self.forward(cache, part, index + start, mask)
            return start + chunk, cache, take(start, left, hidden, found)

        state = (ops.zeros((), dtype="int32"), cache, found)
        _, cache, found = ops.while_loop(more, process_chunk, state)
        return cache, found

    def _make_step(self, donate: bool) -> Callable:
        kernels = LoopKernels(self.functions.layers)
        output = self.task.output

        def step(
            cache: Cache, token: Tensor, index: Index, max_length: Tensor, steps: Tensor
        ) -> tuple:
            fits = (index < max_length)[:, None]
            matrices = kernels.before_loop()

            def body(step: Tensor, cache: Cache, _: Any) -> tuple:
                with kernels.within_loop(matrices):
                    hidden, cache = self.forward(
                        cache, token[:, None], index, fits, donate
                    )
                    logits = self.task.compute_logits(hidden)[:, 0]
                return step + 1, cache, logits

            if matrices:
                # A loop of one step, in which kernels are read faster.
                empty = ops.zeros((token.shape[0], output.shape[-1]), output.dtype)
                start = (ops.zeros((), dtype="int32"), cache, empty)
                found = ops.while_loop(lambda step, *_: step < steps, body, start)
            else:
                found = body(0, cache, None)
            _, cache, logits = found
            # A compiled step can raise no error; NaN is better than wrong logits.
            return ops.where(fits, logits, float("nan")), cache

        return step

    def _make_process(self, capacity: int, chunk: int) -> Callable:
        output = self.decoder.output

        def take_last(start: Tensor, left: Tensor, hidden: Tensor, last: Any) -> Tensor:
            # Only the last token's hidden state goes to the vocabulary.
            ends = ops.logical_and(left > 0, left <= chunk)[..., None]
            place = ops.clip(left - 1, 0, chunk - 1)[..., None]
            here = ops.take_along_axis(hidden, place, axis=1)  # (rows, 1, dim)
            return ops.where(ends, here, last)

        def process(
            cache: Cache, tokens: Tensor, index: Index, lengths: Tensor
        ) -> tuple[Tensor, Cache]:
            rows = lengths.shape[0]
            cache = cache or self.create_cache(rows, capacity)
            last = ops.zeros((rows, 1, output.shape[-1]), dtype=output.dtype)
            cache, last = self._over_chunks(
                tokens, lengths, chunk, index, cache, last, take_last
            )
            return self.task.compute_logits(last)[:, 0], cache

        return process

    def _make_score(self, capacity: int, chunk: int, top: int) -> Callable:
        def score(
            cache: Cache, tokens: Any, following: Tensor, lengths: Tensor
        ) -> Logprobs:
            rows, width = following.shape

            def take(start: Tensor, _: Tensor, hidden: Tensor, found: Any) -> Any:
                goals = ops.slice(following, (0, start), (rows, chunk))
                new = logprobs_of(self.task.compute_logits(hidden), goals, top)
                return _put(found, new, start)

            cache = cache or self.create_cache(rows, capacity)
            zeros = zero_logprobs(rows, width, top)
            return self._over_chunks(tokens, lengths, chunk, 0, cache, zeros, take)[1]

        return score

    def make_decode(self, sampling: Sampling) -> Callable:
        """Returns the function that `decode` compiles."""
        kernels = LoopKernels(self.functions.layers)

        def decode(cache: Cache, *args: Any) -> tuple:
            token, index, room, memory, finished, steps, stops, settings = args
            rows, width = token.shape[0], self.sizes.block_steps
            rows_differ = len(index.shape) == 1
            matrices = kernels.before_loop()

            def more(step: Tensor, *state: Any) -> Tensor:
                finished = state[5]
                return ops.logical_and(step < steps, ops.logical_not(ops.all(finished)))

            def body(step: Tensor, *state: Any) -> tuple:
                cache, token, index, room, memory, finished, *found = state
                active = ops.logical_not(finished)
                new = active[:, None]
                with kernels.within_loop(matrices):
                    hidden, cache = self.forward(cache, token[:, None], index, new)
                    logits = self.task.compute_logits(hidden)[:, 0]
                index = index + (ops.cast(active, "int32") if rows_differ else 1)
                sampled, logprobs, memory = sampling.choose(
                    logits, index, settings, memory
                )
                values = [sampled, active, logprobs]
                values = tree.map_structure(lambda x: x[:, None], values)
                found = _put(found, values, step)
                done = ops.logical_or(room <= 1, is_any(sampled, stops))
                finished = ops.logical_or(finished, done)
                # -1, for NaN, is no token that can be embedded.
                finished = ops.logical_or(finished, sampled < 0)
                token = ops.maximum(sampled, 0)
                return step + 1, cache, token, index, room - 1, memory, finished, *found

            found = [ops.zeros((rows, width), dtype=x) for x in ("int32", "bool")]
            found.append(
                () if sampling.top is None else zero_logprobs(rows, width, sampling.top)
            )
            state = (cache, token, index, room, memory, finished, *found)
            loop_vars = (ops.zeros((), dtype="int32"), *state)
            run_loop = sampling.sampler.run_loop
            return tuple(run_loop(more, body, model=self.task, loop_vars=loop_vars)[1:])

        return decode


def _part(tokens: Tensor, start: Tensor, length: int) -> Tensor:
    """Returns so many tokens of all rows, or what there is beside them."""
    rows, _, *sizes = tokens.shape
    return ops.slice(tokens, (0, start, *[0] * len(sizes)), (rows, length, *sizes))


def _put(buffers: Any, values: Any, place: Tensor) -> Any:
    """Returns buffers, `(rows, length, ...)`, with values in their place."""

    def put(buffer: Tensor, value: Tensor) -> Tensor:
        start = (0, place, *[0] * (len(buffer.shape) - 2))
        return ops.slice_update(buffer, start, value)

    return tree.map_structure(put, buffers, values)


def is_any(token: Tensor, stops: Tensor) -> Tensor:
    """Returns which tokens are among `stops`: a vector, or one for each row."""
    return ops.any(token[..., None] == stops, axis=-1)
