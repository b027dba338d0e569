"""Requests that join a running batch as rows become free, and leave when they end."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from keras import tree

from attention.contract import Tensor, check_positive_int, describe
from blocks.generation.compilation import CompiledStep
from blocks.generation.endings import Endings, resolve_stops
from blocks.generation.engine import Engine
from blocks.generation.options import GenerationOptions, Options, check_processors
from blocks.generation.processors import LogitsProcessor
from blocks.generation.running_batch import Block
from blocks.generation.samplers import check_sampler
from blocks.generation.texts import TextPieces
from blocks.serving.job import Job
from blocks.serving.prefixes import Prefixes
from blocks.serving.request import Request, ServerBusy
from blocks.serving.shared_options import shared_options
from blocks.serving.slots import Slots


class Server:
    """Continues requests of any options together, as rows of one running batch.

    A request joins as soon as a row is free, and leaves when it ends or is cancelled. Prompts
    are prefilled in chunks between decode steps, so that nobody waits long, and a
    beginning that prompts share is processed once. Each answer is what `generate` gives
    alone. Made by `lm.serve(...)`; it has a thread of its own, and compiles all of its
    steps before it returns.

    The model is not trained or changed while it is served.

    Args:
        task: a `blocks.CausalLM`, compiled with the sampler `"greedy"`, `"random"`,
            `"top_k"` or `"top_p"`.
        max_rows: int. How many requests run at once.
        max_length: int. How many tokens a request has at most, prompt and new ones
            together. Memory for `max_rows` such rows, and for those of `max_prefixes` and
            one more, is reserved.
        max_waiting: int. How many requests wait for a row; another is a `ServerBusy`.
        max_prefixes: int. How many shared beginnings of prompts are kept.
        max_logprobs: int or `None`. The largest `return_logprobs` of a request.
        block_steps: int. How many tokens a row gets between two looks at new requests.
        grammars: bool. Whether requests may have a `grammar`. While one has, rows get a
            token at a time.
        processors: list of the `blocks.LogitsProcessor`s that requests may have.

    Example:

    >>> from blocks import CausalLM, CustomBackbone
    >>> lm = CausalLM(CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=64))
    >>> lm.compile(sampler="greedy")
    >>> with lm.serve(max_rows=2, max_length=32) as server:
    ...     requests = [
    ...         server.submit([1, 2, i], max_new_tokens=4, stop_token_ids=None)
    ...         for i in range(5)
    ...     ]
    ...     answers = [x.result() for x in requests]
    >>> [len(x.token_ids) for x in answers]
    [4, 4, 4, 4, 4]
    """

    def __init__(
        self,
        task: Any,
        max_rows: int = 8,
        max_length: int = 1024,
        max_waiting: int = 256,
        max_prefixes: int = 2,
        max_logprobs: int | None = None,
        block_steps: int = 8,
        grammars: bool = False,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.max_rows = check_positive_int("max_rows", max_rows)
        self.max_length = check_positive_int("max_length", max_length)
        self.max_waiting = check_positive_int("max_waiting", max_waiting)
        self.block_steps = check_positive_int("block_steps", block_steps)
        self._task, self.preprocessor = task, task.preprocessor
        self._sampler = check_sampler(task, "`serve`")
        self._engine = Engine(task)
        limit = self._engine.max_positions
        if limit is not None and max_length > limit:
            raise ValueError(
                f"The model has learned {limit} positions. Received: "
                f"max_length={max_length}"
            )
        self._how = (max_logprobs, grammars, check_processors(processors))
        # === What waits, and what runs ===
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._prefilling: collections.deque[int] = collections.deque()
        self._rows: list[Job | None] = [None] * max_rows
        self._closed = False
        self._error: BaseException | None = None
        self.prefixes = Prefixes(max_prefixes)
        self.tokens_made = 0
        neutral = self._options({}, max_rows)
        self._slots = Slots(self._engine, max_rows, max_length, neutral)
        self._warm_up()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lm.serve")
        self._thread.start()

    # === For clients, in any thread ===

    def submit(
        self,
        prompt: Any,
        max_new_tokens: int | None = None,
        stop_token_ids: Any = "auto",
        as_text: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Request:
        """Adds a request, and returns at once.

        Args:
            prompt: a string, or the tokens of one row.
            max_new_tokens: int or `None`, which means as many as `max_length` has room for.
            stop_token_ids: as for `CausalLM.generate`.
            as_text: bool or `None`. Whether the answer is text; `None` means if the prompt
                is.
            **options: see `blocks.GenerationOptions`; `processors` are some of the
                server's.

        Returns:
            A `blocks.Request`.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if the prompt is empty, is more than one row, has embeddings, or is
                longer than `max_length`; or an option is not allowed.
            blocks.ServerBusy: if `max_waiting` requests are waiting.
            RuntimeError: if the server is closed.
        """
        task = self._task
        (prompts,), is_single = task._read(
            prompt, self.max_length, max_new_tokens, one_for="submit"
        )
        if not is_single:
            raise ValueError(
                "`prompt` must be one string or one row of tokens. Submit each of several "
                f"by itself. Received: prompt={describe(prompt)}"
            )
        if prompts.sources is not None:
            raise ValueError(
                "The server takes text and tokens, without embeddings in their place: pass "
                f"those to `generate`. Received: prompt={describe(prompt)}"
            )
        endings_at = resolve_stops(stop_token_ids, task)
        if len(endings_at) > self._slots.num_stops:
            raise ValueError(
                f"A request has at most {self._slots.num_stops} stop tokens. Received: "
                f"stop_token_ids={describe(stop_token_ids)}"
            )
        how = self._options(options, 1)
        before = prompts.rows()
        (tokens,) = before
        endings = Endings(endings_at, how.stop, task.preprocessor, before)
        pieces = None
        if prompts.as_text if as_text is None else as_text:
            pieces = TextPieces(1, task.preprocessor, how.stop, before)
        room = int(prompts.limits[0]) - len(tokens)
        if room < 1:
            raise ValueError(
                f"The prompt has {len(tokens)} tokens, which leaves no room for a new one "
                f"in the server's max_length={self.max_length}."
            )
        job = self._job(tokens, room, how, endings, pieces)
        job.top = options.get("return_logprobs")
        if options.get("grammar") is not None:
            (job.grammar,) = job.sampling.hosted.values()
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self.max_waiting:
                raise ServerBusy(
                    f"{len(self._waiting)} requests are waiting, and max_waiting="
                    f"{self.max_waiting}. Try again later."
                )
            self._waiting.append(job)
            self._changed.notify()
        return job.request

    @property
    def running(self) -> int:
        """Returns how many requests have a row."""
        return sum(x is not None for x in self._rows)

    @property
    def waiting(self) -> int:
        """Returns how many requests wait for a row."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """Returns whether requests are taken."""
        return not self._closed

    @property
    def compiled_steps(self) -> tuple[CompiledStep, ...]:
        """Returns the steps compiled so far: none after the server was made."""
        return tuple(self._engine.functions.steps)

    def close(self) -> None:
        """Ends all requests with what they have, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._error is not None:
            raise RuntimeError("The server's loop failed.") from self._error
        if self._closed:
            raise RuntimeError("The server is closed.")

    def _cancel(self, request: Request) -> None:
        with self._changed:
            for job in [x for x in self._waiting if x.request is request]:
                self._waiting.remove(job)
                job.finish("cancelled")
            for job in self._jobs():
                # Its row is free after the step that is going on.
                job.cancelled = job.cancelled or job.request is request
            self._changed.notify()

    def _jobs(self) -> list[Job]:
        running = [x for x in self._rows if x is not None]
        return [*running, *self._waiting]

    def _options(self, options: Any, rows: int) -> Options:
        return shared_options(options, self._task, self._sampler, rows, *self._how)

    def _job(
        self,
        tokens: np.ndarray,
        room: int,
        options: Options,
        endings: Endings,
        pieces: TextPieces | None,
    ) -> Job:
        sampling = self._engine.sampling(options)
        # What processors make of a prompt is made here, in the thread of whoever asks.
        memory = sampling.begin([tokens], self.max_length)
        request = Request(self._cancel, tokens)
        return Job(request, tokens, room, sampling, memory, endings, pieces)

    # === The loop, in the server's own thread ===

    def _run(self) -> None:
        try:
            while self._wait():
                self._admit()
                self._prefill()
                self._decode()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._closed = True
            left = self._jobs()
        for job in left:
            failed = None
            if self._error is not None:
                failed = RuntimeError(f"The server's loop failed: {self._error!r}")
            job.finish("cancelled", failed)

    def _wait(self) -> bool:
        """Waits until there is work; returns whether there is, and no end."""
        with self._changed:
            while not (self._closed or self._waiting or self.running):
                self._changed.wait()
            return not self._closed

    def _admit(self) -> None:
        """Gives free rows to requests that wait, the oldest first."""
        with self._changed:
            for row, job in enumerate(self._rows):
                if job is None and self._waiting:
                    self._rows[row] = self._waiting.popleft()
                    self._prefilling.append(row)

    def _prefill(self) -> None:
        """Processes chunks of prompts, the oldest first.

        While fewer rows decode than wait for their prompts there are several: a decode
        step takes as long without these rows as with them.
        """
        decoding = int(np.logical_not(self._slots.finished).sum())
        for _ in range(max(1, len(self._prefilling) - decoding)):
            if not self._prefilling:
                return
            row = self._prefilling[0]
            job: Any = self._rows[row]
            logits = None if job.cancelled else self._next_chunk(job)
            if job.cancelled:
                self._prefilling.popleft()
                self._leave(row, "cancelled")
            elif logits is not None:
                self._prefilling.popleft()
                self._give(row, self._slots.join(row, job, logits))

    def _next_chunk(self, job: Job) -> Tensor | None:
        """Processes the next chunk of a prompt; returns the logits after its end."""
        state = job.prefill
        if state.cache is None:
            state.done, state.cache = self.prefixes.find(job.tokens)
            state.shared = self.prefixes.shared(job.tokens)
        logits = self._process(job)
        if state.done == state.shared:
            self.prefixes.keep(job.tokens[: state.done], state.cache)
        return logits if state.done == len(job.tokens) else None

    def _process(self, job: Job) -> Tensor:
        """Processes the next chunk of a prompt, and returns the logits after it."""
        state, end = job.prefill, len(job.tokens)
        if not self._engine.sites.whole_prompt:
            end = min(end, state.done + self._chunk)
            # A beginning that others share is kept at its end.
            end = min(end, state.shared) if state.done < state.shared else end
        logits, state.cache = self._slots.process(
            state.cache, job.tokens, state.done, end
        )
        state.done = end
        return logits

    def _decode(self) -> None:
        """Gives each row its next tokens, if there are any."""
        for row, job in enumerate(self._rows):
            if job is not None and job.cancelled and not self._slots.finished[row]:
                self._leave(row, "cancelled")
        finished = self._slots.finished
        if finished.all():
            return
        grammars = {
            row: job.grammar
            for row, job in enumerate(self._rows)
            if job is not None and job.grammar is not None and not finished[row]
        }
        new, failed = self._slots.decode(self._steps(), grammars)
        for row, error in failed.items():
            new.valid[row] = False
            self._leave(row, error=error)
        for row in np.flatnonzero(new.valid.any(axis=1)).tolist():
            self._give(row, tree.map_structure(lambda x: x[row : row + 1], new))  # noqa: B023

    def _give(self, row: int, block: Block) -> None:
        """Gives a request new tokens, and ends it where they end."""
        job: Any = self._rows[row]
        self.tokens_made += int(block.valid.sum())
        try:
            if job.add(block):
                self._leave(row)
        except Exception as error:
            # Of this request alone.
            self._leave(row, error=error)

    def _leave(
        self, row: int, reason: str | None = None, error: Exception | None = None
    ) -> None:
        """Ends the request of a row, which is free then."""
        job: Any = self._rows[row]
        self._slots.leave(row)
        with self._changed:
            self._rows[row] = None
        job.finish(reason, error)

    def _steps(self) -> int:
        """Returns how many steps to decode: fewer while a row waits for its prompt."""
        return 1 if self._prefilling else self.block_steps

    @property
    def _chunk(self) -> int:
        return self._engine.sizes.chunk_length(1, self.max_length)

    def _warm_up(self) -> None:
        """Compiles all steps, with tokens that nobody asked for."""
        if self._task.preprocessor is not None:
            # It makes layers the first time, which several threads must not.
            self._task.preprocessor.generate_preprocess(["a"])
        for length in (1, self._engine.sizes.few_tokens + 1, self._chunk):
            tokens = np.zeros((min(length, self.max_length - 1),), "int32")
            job = self._job(tokens, 3, self._options({}, 1), Endings(), None)
            self._slots.join(0, job, self._process(job))
            self._slots.decode(1, {})
            for grammar in job.sampling.hosted.values():
                self._slots.decode(1, {0: grammar})
            self._slots.leave(0)
