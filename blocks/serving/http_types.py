"""What clients ask for over HTTP, in OpenAI's words, and the form of the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pydantic

from blocks.generation.texts import TextPieces


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one HTTP request may take.

    Attributes:
        body_bytes: int. The largest body.
        new_tokens: int or `None`. The most new tokens of an answer; `None` means what the
            server's `max_length` has room for.
        answers: int. The most answers, prompts times `n`.
        seconds: float. How long it may take.
    """

    body_bytes: int = 4 * 2**20
    new_tokens: int | None = None
    answers: int = 64
    seconds: float = 600.0


class Asked(pydantic.BaseModel):
    """What both kinds of requests have. Fields that are not known are passed over."""

    kind: ClassVar[str]
    prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    model: str | None = None
    max_tokens: int | None = pydantic.Field(None, ge=1)
    n: int = pydantic.Field(1, ge=1)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None

    @pydantic.field_validator("n", "stream", mode="before")
    @classmethod
    def _default(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Returns the default for null, which is `None` for the other fields."""
        name = str(info.field_name)
        return cls.model_fields[name].default if value is None else value

    def options(self, limits: Limits) -> dict[str, Any]:
        """Returns arguments of `Server.submit`."""
        names = (
            "temperature",
            "top_p",
            "min_p",
            "seed",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "logit_bias",
            "stop",
        )
        options = {x: getattr(self, x) for x in names if getattr(self, x) is not None}
        if self.top_k is not None:
            # vLLM's -1 means all, too.
            options["top_k"] = max(self.top_k, 0)
        most = [x for x in (self.most_tokens(), limits.new_tokens) if x is not None]
        options["max_new_tokens"] = min(most, default=None)
        options["return_logprobs"] = self.most_logprobs()
        return options

    def most_tokens(self) -> int | None:
        """Returns how many new tokens are asked for."""
        return self.max_tokens

    def most_logprobs(self) -> int | None:
        """Returns how many likeliest tokens are asked for, or `None`."""
        raise NotImplementedError


class CompletionAsked(Asked):
    """The body of `/v1/completions`."""

    kind = "completions"
    prefix = "cmpl"
    object_name = "text_completion"
    chunk_name = "text_completion"

    prompt: str | list[str] | list[int] | list[list[int]]
    # OpenAI's default.
    max_tokens: int | None = pydantic.Field(16, ge=1)
    logprobs: int | None = pydantic.Field(None, ge=0)
    # What changes the answer and is not there is refused.
    echo: Literal[False] | None = False
    suffix: None = None
    best_of: Literal[1] | None = None

    def prompts(self) -> list[Any]:
        """Returns the prompts, each a string or a list of tokens."""
        one = isinstance(self.prompt, str)
        # An empty list is a prompt that has no tokens.
        one = one or all(isinstance(x, int) for x in self.prompt)
        return [self.prompt] if one else list(self.prompt)

    def most_logprobs(self) -> int | None:
        return self.logprobs

    def logprobs_of(
        self, answer: Any, to_text: Callable[[int], str], pieces: TextPieces | None
    ) -> Any:
        """Returns the log-probabilities of tokens, which are added to `pieces`.

        `pieces` is `None` where they were not asked for.

        The `text_offset` of a token is how long the text before it is. Where several make
        up a character, it begins where that does.
        """
        if pieces is None or answer.logprobs is None:
            return None
        tokens = [to_text(x) for x in answer.token_ids]
        best: list[Any] = [{}] * len(tokens)
        if self.logprobs:
            numbers = zip(*(x[:, : self.logprobs] for x in answer.logprobs[1:]))
            best = [
                {to_text(token): float(x) for x, token in zip(*pair)}
                for pair in numbers
            ]
        places = []
        for i in range(len(tokens)):
            places.append(len(pieces.given[0]))
            pieces.add([answer.token_ids[i : i + 1]])
        return {
            "tokens": tokens,
            "token_logprobs": answer.logprobs.chosen.tolist(),
            "top_logprobs": best,
            "text_offset": places,
        }

    def choice(self, number: int, text: str, reason: Any, logprobs: Any) -> dict:
        """Returns a whole answer."""
        return self.chunk(number, text, reason, logprobs)

    def chunk(self, number: int, text: str, reason: Any, logprobs: Any) -> dict:
        """Returns a piece of an answer."""
        answer = {"index": number, "text": text, "finish_reason": reason}
        return {**answer, "logprobs": logprobs}

    def first_chunk(self, number: int) -> dict | None:
        """Returns what comes before the first piece."""
        return None


class ChatAsked(Asked):
    """The body of `/v1/chat/completions`."""

    kind = "chat"
    prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    messages: list[dict[str, Any]] = pydantic.Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = pydantic.Field(None, ge=0)

    @pydantic.field_validator("messages")
    @classmethod
    def _join_parts(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns messages whose contents are no lists of parts: templates take text."""
        return [
            {**x, "content": _joined(x["content"])}
            if isinstance(x.get("content"), list)
            else x
            for x in messages
        ]

    def options(self, limits: Limits) -> dict[str, Any]:
        wanted = self.response_format or {"type": "text"}
        if wanted.get("type") == "json_object":
            grammar: Any = {"type": "object"}
        elif wanted.get("type") == "json_schema":
            grammar = (wanted.get("json_schema") or {}).get("schema")
            if not isinstance(grammar, dict):
                raise ValueError(
                    "`response_format.json_schema.schema` must be an object"
                )
        elif wanted.get("type") == "text":
            grammar = None
        else:
            raise ValueError(
                f"`response_format.type` is unknown: {wanted.get('type')!r}"
            )
        return {**super().options(limits), "grammar": grammar}

    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def most_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def logprobs_of(
        self, answer: Any, to_text: Callable[[int], str], pieces: TextPieces | None
    ) -> Any:
        """Returns the log-probabilities of an answer's tokens."""
        if not self.logprobs or answer.logprobs is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = to_text(token)
            content = {"token": text, "logprob": float(logprob)}
            return {**content, "bytes": list(text.encode("utf-8"))}

        chosen, best, best_ids = answer.logprobs
        content = []
        for i, (token, logprob) in enumerate(zip(answer.token_ids, chosen)):
            top: list[Any] = []
            if self.top_logprobs:
                pairs = zip(best_ids[i, : self.top_logprobs], best[i])
                top = [entry(*pair) for pair in pairs]
            content.append({**entry(token, logprob), "top_logprobs": top})
        return {"content": content}

    def choice(self, number: int, text: str, reason: Any, logprobs: Any) -> dict:
        """Returns a whole answer."""
        message = {"role": "assistant", "content": text}
        answer = {"index": number, "message": message, "finish_reason": reason}
        return {**answer, "logprobs": logprobs}

    def chunk(self, number: int, text: str, reason: Any, logprobs: Any) -> dict:
        """Returns a piece of an answer."""
        delta = {"content": text} if text else {}
        answer = {"index": number, "delta": delta, "finish_reason": reason}
        return {**answer, "logprobs": logprobs}

    def first_chunk(self, number: int) -> dict | None:
        """Returns what comes before the first piece."""
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "finish_reason": None}


def _joined(parts: list[Any]) -> str:
    """Returns the text of a message's parts."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                'The parts of `content` must be {"type": "text", "text": "..."}, as the '
                f"model reads text. Received a part of type {kind!r}"
            )
    return "".join(part["text"] for part in parts)
