"""One request to a running batch, as whoever made it sees it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import numpy as np

from blocks.generation.outputs import Completion

# What is at the end of the pieces.
_END = object()


class ServerBusy(RuntimeError):
    """Says that as many requests are waiting as a `blocks.Server` takes."""


class Request:
    """A request in progress, made by `blocks.Server.submit`.

    `request.result()` waits for the whole answer; iterating over the request yields the
    pieces of its text, or arrays of new tokens, as they are made; with `return_logprobs`
    it yields `Completion`s of these, without a `finish_reason`. In `asyncio`, `await
    request` and `async for piece in request` do the same. All may be used at once, from
    any thread.

    Attributes:
        prompt: `int32` array: the tokens of the prompt.
    """

    def __init__(self, cancel: Callable[[Request], None], prompt: np.ndarray) -> None:
        self._cancel = cancel
        self.prompt = prompt
        self._future: concurrent.futures.Future = concurrent.futures.Future()
        # Whoever stops waiting for it, as a task of `asyncio`, does not cancel it.
        self._future.set_running_or_notify_cancel()
        self._telling = threading.Lock()
        self._pieces: list[Any] = []
        self._listeners: list[Callable[[Any], Any]] = []

    @property
    def done(self) -> bool:
        """Returns whether the answer is complete, or has failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the answer.

        Args:
            timeout: float or `None`. For how many seconds to wait at most.

        Returns:
            A `blocks.Completion`, whose text is the new text. Its `finish_reason` may also
            be `"cancelled"`.

        Raises:
            TimeoutError: if there is no answer by then.
            ValueError: if the model's logits were NaN or infinite.
            RuntimeError: if the server was closed before, or its loop failed.
        """
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Ends the request with what it has, unless it has ended."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Any]:
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        self._listen(pieces.put)
        while (piece := pieces.get()) is not _END:
            yield piece
        self.result()

    def __await__(self) -> Generator[Any, None, Completion]:
        return asyncio.wrap_future(self._future).__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue = asyncio.Queue()
        self._listen(lambda x: loop.call_soon_threadsafe(pieces.put_nowait, x))
        while (piece := await pieces.get()) is not _END:
            yield piece
        self.result()

    def _listen(self, listener: Callable[[Any], Any]) -> None:
        with self._telling:
            for piece in self._pieces:
                listener(piece)
            self._listeners.append(listener)

    def add(self, piece: Any) -> None:
        """Tells new text or tokens; called by the server."""
        with self._telling:
            self._pieces.append(piece)
            for listener in self._listeners:
                _tell(listener, piece)

    def finish(
        self, completion: Completion | None, error: Exception | None = None
    ) -> None:
        """Tells the answer, or the error instead; called by the server."""
        if error is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(completion)
        self.add(_END)


def _tell(listener: Callable[[Any], Any], piece: Any) -> None:
    # The event loop of a client that went away is closed.
    with contextlib.suppress(RuntimeError):
        listener(piece)
