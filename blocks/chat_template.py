"""Chat templates: conversations become the text that a model was trained on."""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any

from attention.contract import describe
from blocks.checkpoints.packages import require


def render_chats(
    template: str | dict[str, str] | None,
    messages: Any,
    tools: Any,
    **variables: Any,
) -> str | list[str]:
    """Returns conversations as text, as `CausalLMPreprocessor.apply_chat_template`.

    The template comes from outside. It runs in Jinja2's sandbox, and what it is given
    is plain data, without methods of its own.
    """
    if template is None:
        raise ValueError(
            "The preprocessor has no `chat_template`. Models that were trained on "
            "conversations come with one: pass it, or set "
            '`preprocessor.chat_template = "..."`.'
        )
    several = isinstance(messages, (list, tuple)) and len(messages) > 0
    several = several and all(isinstance(x, (list, tuple)) for x in messages)
    chats = [_read_chat(chat) for chat in (messages if several else [messages])]
    if tools is not None:
        tools = _plain("tools", tools)
        if not isinstance(tools, list) or not all(isinstance(x, dict) for x in tools):
            raise TypeError(
                "`tools` must be a list of dicts, a JSON schema for each tool. "
                f"Received: tools={describe(tools)}"
            )
    compiled = _compile(_choose(template, tools))
    variables = {k: _plain(k, value) for k, value in variables.items()}
    texts = []
    for chat in chats:
        try:
            texts.append(compiled.render(messages=chat, tools=tools, **variables))
        except Exception as error:  # a template may raise whatever it likes
            raise ValueError(
                f"The chat template failed on these messages: {error} "
                f"({type(error).__name__}). Templates differ in the roles they know, "
                "and in their order."
            ) from error
    return texts if several else texts[0]


def _read_chat(messages: Any) -> list[dict[str, Any]]:
    """Returns the messages of one conversation as plain data, checked."""
    example = '[{"role": "user", "content": "Hi"}]'
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(
            f"`messages` must be a list of dicts, such as {example}, or a list of such "
            f"lists. Received: messages={describe(messages)}"
        )
    for number, message in enumerate(messages):
        known = isinstance(message, dict) and "role" in message
        if not known or not {"content", "tool_calls"} & set(message):
            raise ValueError(
                "Each message must be a dict with the keys `role` and `content` (or "
                f"`tool_calls`), such as {example}. Message {number} is "
                f"{describe(message)}"
            )
    # Templates ask whether there are tool calls, not whether they are `None`.
    return [
        {key: value for key, value in message.items() if value is not None}
        for message in _plain("messages", messages)
    ]


def _plain(name: str, value: Any) -> Any:
    """Returns a copy made of dicts, lists, strings and numbers only."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be plain data (dicts, lists, strings, numbers): {error}."
        ) from error


def _choose(template: str | dict[str, str], tools: Any) -> str:
    """Returns the template to use of several with names."""
    if isinstance(template, str):
        return template
    name = "tool_use" if tools is not None and "tool_use" in template else "default"
    if name not in template:
        raise ValueError(
            "The preprocessor has several chat templates, and none is the default. Set "
            "`preprocessor.chat_template` to one of them. Received: "
            f"{sorted(template)}"
        )
    return template[name]


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """Returns the compiled template, with what published templates take for granted."""
    require("jinja2", "Chat templates")
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Marks what the model says; here, only its text counts."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        # Jinja2's own escapes what HTML does not allow.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"`chat_template` is no template that Jinja2 can read: {error}."
        ) from error
