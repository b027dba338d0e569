"""The HTTP interface of a server: OpenAI's endpoints for completions and chat."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
import numpy as np
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from blocks.generation import Completion
from blocks.generation.texts import TextPieces
from blocks.serving.http_metrics import Metrics
from blocks.serving.http_types import ChatAsked, CompletionAsked, Limits
from blocks.serving.request import Request, ServerBusy
from blocks.serving.server import Server

# How often a client is looked for that went away, in seconds.
_LOOK = 0.25


class _Refused(Exception):
    """An error of OpenAI's interface: a status, a kind, a message, and headers."""

    def __init__(
        self, status: int, kind: str, message: str, headers: Any = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    def response(self) -> JSONResponse:
        error = {"message": str(self), "type": self.kind, "param": None, "code": None}
        return JSONResponse({"error": error}, self.status, self.headers)


def _refusal(error: Exception, is_open: bool = True) -> _Refused:
    """Returns what clients are told of an error of a server that `is_open`, or not."""
    if isinstance(error, ServerBusy):
        return _Refused(429, "rate_limit_error", str(error), {"Retry-After": "1"})
    if isinstance(error, RuntimeError):
        return _Refused(500 if is_open else 503, "server_error", str(error))
    return _Refused(400, "invalid_request_error", str(error))


def create_app(
    server: Server,
    name: str,
    to_prompt: Callable[..., str],
    to_text: Callable[[int], str],
    api_key: str | None = None,
    limits: Limits | None = None,
) -> fastapi.FastAPI:
    """Returns an ASGI application that answers by a running server.

    It has OpenAI's `/v1/completions`, `/v1/chat/completions` and `/v1/models`, `/health`,
    and `/metrics` for Prometheus. Errors have OpenAI's form.

    Args:
        server: a `blocks.Server`, of a model with a preprocessor.
        name: str. The model's name.
        to_prompt: makes a prompt of `messages` and `tools`, such as
            `lm.apply_chat_template`.
        to_text: makes the text of one token.
        api_key: str or `None`. What clients must send as a bearer token.
        limits: a `Limits`; `None` means the defaults.
    """
    app = fastapi.FastAPI(title="keras-transformer-blocks")
    http = _Http(server, name, to_prompt, to_text, limits or Limits())
    app.add_middleware(_Guard, api_key=api_key, limits=http.limits)
    model = {"id": name, "object": "model", "created": 0, "owned_by": "blocks"}

    @app.exception_handler(_Refused)
    async def _(_: fastapi.Request, error: _Refused) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _(_: fastapi.Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"][1:])
        text = f"`{where}`: {first['msg']}"
        return _Refused(400, "invalid_request_error", text).response()

    @app.exception_handler(HTTPException)
    async def _(_: fastapi.Request, error: HTTPException) -> Response:
        kind, text = "invalid_request_error", error.detail
        return _Refused(error.status_code, kind, text, error.headers).response()

    @app.get("/health")
    async def health() -> Response:
        status = "ok" if server.is_open else "closed"
        return JSONResponse({"status": status}, 200 if server.is_open else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        content, kind = http.metrics.text()
        return Response(content, media_type=kind)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        if wanted != name:
            raise HTTPException(404, f"There is no model {wanted!r}, only {name!r}.")
        return model

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked, request: fastapi.Request) -> Response:
        return await http.answer(asked, asked.prompts(), request)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, request: fastapi.Request) -> Response:
        try:
            prompt = to_prompt(asked.messages, tools=asked.tools)
        except (TypeError, ValueError) as error:
            raise _refusal(error) from error
        return await http.answer(asked, [prompt], request)

    return app


class _Guard:
    """Looks at the key and the size of the body, before anything is read."""

    def __init__(self, app: Any, api_key: str | None, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.wanted = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = None
        if self.wanted is not None and scope["path"].startswith("/v1/"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self.wanted):
                text = "The API key is missing or wrong."
                refused = _Refused(401, "authentication_error", text)
        most, size = self.limits.body_bytes, 0
        too_large = f"The body is larger than {most} bytes."
        if int(headers.get(b"content-length", 0)) > most:
            refused = refused or _Refused(413, "invalid_request_error", too_large)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return

        async def counted() -> Any:
            # A body in chunks has no length before it.
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, too_large)
            return message

        await self.app(scope, counted, send)


class _Http:
    """Answers what was asked, of one application."""

    def __init__(
        self,
        server: Server,
        name: str,
        to_prompt: Callable[..., str],
        to_text: Callable[[int], str],
        limits: Limits,
    ) -> None:
        self.server, self.name, self.to_text = server, name, to_text
        self.limits = limits
        self.metrics = Metrics(server)

    async def answer(
        self,
        asked: CompletionAsked | ChatAsked,
        prompts: list[Any],
        request: fastapi.Request,
    ) -> Response:
        """Submits what was asked, and returns the answer or its stream."""
        most = self.limits.answers
        try:
            options = asked.options(self.limits)
        except ValueError as error:
            raise _refusal(error) from error
        if len(prompts) * asked.n > most:
            text = f"A request has at most {most} answers, prompts times `n`."
            raise _Refused(400, "invalid_request_error", text)
        found: list[Request] = []
        try:
            for prompt in prompts:
                for number in range(asked.n):
                    own = {**options, "as_text": True}
                    if number and own.get("seed") is not None:
                        # As `num_return_sequences`: numbers of its own for each.
                        own["seed"] = (own["seed"] + (number << 32)) % 2**64
                    found.append(
                        await run_in_threadpool(self.server.submit, prompt, **own)
                    )
        except (TypeError, ValueError, RuntimeError) as error:
            _cancel(found)
            raise _refusal(error, self.server.is_open) from error
        self.metrics.asked(asked.kind, len(found))
        head = {
            "id": f"{asked.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }
        if asked.stream:
            events = self._stream_events(asked, found, head)
            return StreamingResponse(events, media_type="text/event-stream")
        answers = await self._wait(found, request)
        pairs = enumerate(zip(found, answers))
        choices = [self._choice(asked, i, *pair) for i, pair in pairs]
        usage = _usage(answers, asked.n)
        head["object"] = asked.object_name
        return JSONResponse({**head, "choices": choices, "usage": usage})

    async def _wait(
        self, found: list[Request], request: fastapi.Request
    ) -> list[Completion]:
        """Waits for all answers, no longer than the limit or than the client does."""
        timer = self._end_in_time(found)
        waiting = asyncio.gather(*found, return_exceptions=True)
        while not waiting.done():
            await asyncio.wait([waiting], timeout=_LOOK)
            if await request.is_disconnected():
                _cancel(found)
        timer.cancel()
        answers: Any = await waiting
        for answer in answers:
            if isinstance(answer, BaseException):
                raise _Refused(500, "server_error", str(answer)) from answer
            self.metrics.made(answer)
        return answers

    def _end_in_time(self, found: list[Request]) -> asyncio.TimerHandle:
        """Starts the clock at whose end requests end with what they have."""
        loop = asyncio.get_running_loop()
        return loop.call_later(self.limits.seconds, _cancel, found)

    async def _stream_events(
        self,
        asked: CompletionAsked | ChatAsked,
        found: list[Request],
        head: dict[str, Any],
    ) -> AsyncIterator[str]:
        """Yields server-sent events; a client that goes away cancels its requests."""
        pieces: asyncio.Queue = asyncio.Queue()

        async def read(number: int, one: Request) -> None:
            try:
                async for piece in one:
                    await pieces.put((number, piece, None))
                await pieces.put((number, None, await one))
            except Exception as error:
                await pieces.put((number, None, error))

        head = {**head, "object": asked.chunk_name}
        tasks = [asyncio.create_task(read(*x)) for x in enumerate(found)]
        timer = self._end_in_time(found)
        try:
            answers: dict[int, Any] = {}
            texts = [self._pieces(asked, x) for x in found]
            for number in range(len(found)):
                if choice := asked.first_chunk(number):
                    yield _event({**head, "choices": [choice]})
            while len(answers) < len(found):
                number, piece, answer = await pieces.get()
                if isinstance(answer, Exception):
                    yield _event({"error": {"message": str(answer)}})
                    return
                if answer is not None:
                    answers[number] = answer
                    self.metrics.made(answer)
                    choice = asked.chunk(number, "", _reason(answer), None)
                elif isinstance(piece, Completion):
                    logprobs = asked.logprobs_of(piece, self.to_text, texts[number])
                    choice = asked.chunk(number, piece.text or "", None, logprobs)
                else:
                    choice = asked.chunk(number, piece, None, None)
                yield _event({**head, "choices": [choice]})
            if (asked.stream_options or {}).get("include_usage"):
                # They end in any order.
                whole = [answers[number] for number in range(len(found))]
                usage = _usage(whole, asked.n)
                yield _event({**head, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            timer.cancel()
            _cancel(found)
            for task in tasks:
                task.cancel()

    def _choice(
        self,
        asked: CompletionAsked | ChatAsked,
        number: int,
        one: Request,
        answer: Any,
    ) -> dict[str, Any]:
        logprobs = asked.logprobs_of(answer, self.to_text, self._pieces(asked, one))
        return asked.choice(number, answer.text, _reason(answer), logprobs)

    def _pieces(
        self, asked: CompletionAsked | ChatAsked, one: Request
    ) -> TextPieces | None:
        """Returns what makes text of an answer's tokens, if their places are asked for."""
        if asked.most_logprobs() is None:
            # It reads the prompt's end.
            return None
        return TextPieces(1, self.server.preprocessor, (), [one.prompt])


def _cancel(found: list[Request]) -> None:
    for one in found:
        one.cancel()


def _reason(answer: Completion) -> str | None:
    """Returns why an answer ended, in OpenAI's words."""
    return "length" if answer.finish_reason == "cancelled" else answer.finish_reason


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(answers: list[Any], n: int) -> dict[str, int]:
    read = sum(x.prompt_length for x in answers[::n])
    made = int(np.sum([len(x.token_ids) for x in answers]))
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
    }
