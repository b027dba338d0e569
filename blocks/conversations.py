"""Conversations as training data, of which only what the assistant says is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from attention.contract import describe
from blocks.generation.prompts import pad_rows, to_plain

_FORM = (
    "a list of conversations, each a list of dicts with `role` and `content`, such as "
    '[[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]]'
)


def is_conversations(x: Any) -> bool:
    """Returns whether samples are conversations, not texts or tokens."""
    return isinstance(x, dict) and "messages" in x


def read_conversations(x: dict[str, Any], argument: str = "x") -> list[Any]:
    """Returns the conversations of a dict of `messages`, checked as far as the roles."""
    if set(x) != {"messages"}:
        raise TypeError(
            f"`{argument}` must have `messages` alone, as all that is learned is written "
            "by the chat template. (Of a table of `datasets`, pass "
            f'`table.select_columns("messages")`.) Received: {argument}={describe(x)}'
        )
    chats = to_plain(x["messages"])
    received = f"Received: messages={describe(x['messages'])}"
    if not isinstance(chats, (list, tuple)):
        raise TypeError(f"`messages` must be {_FORM}. {received}")
    if not chats:
        raise ValueError(f"`messages` has no conversation. {received}")
    for number, chat in enumerate(chats):
        if not isinstance(chat, (list, tuple)) or not all(
            isinstance(message, dict) for message in chat
        ):
            raise TypeError(
                f"`messages` must be {_FORM}. Conversation {number} is {describe(chat)}"
            )
        roles = [message.get("role") for message in chat]
        if "assistant" not in roles or roles[0] == "assistant":
            raise ValueError(
                "Each conversation of `messages` must have a message of the assistant, "
                "which is what is learned, after one of the system or the user. "
                f"Conversation {number} has the roles {roles}"
            )
    return list(chats)


def tokenized(
    preprocessor: Any, chats: list[Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the tokens of each conversation, and the mask of those that are learned.

    Learned is what `generate` would make after the prompt of each of the assistant's
    turns: what it says, and the token at which it stops. If the template writes no such
    token, the end token follows the last turn.
    """
    for number, chat in enumerate(chats):
        try:
            found = _tokenize(preprocessor, chat)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"Conversation {number} of `messages`: {error}") from error
        yield found


def conversation_samples(
    preprocessor: Any, x: dict[str, Any], sequence_length: int | None = None
) -> tuple[dict[str, Any], Any, Any]:
    """Returns `(x, y, sample_weight)` of conversations, of which the end may be cut."""
    width = (sequence_length or preprocessor.sequence_length) + 1
    pairs = list(tokenized(preprocessor, read_conversations(x)))
    rows, masks = ([row[:width] for row in rows] for rows in zip(*pairs))
    tokens, lengths = pad_rows(rows, width, preprocessor.pad_token_id)
    learned = pad_rows(masks, width)[0].astype(bool)
    real = np.arange(width) < lengths[:, None]
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": real[:, :-1]}
    return inputs, tokens[:, 1:], learned[:, 1:]


def _tokenize(preprocessor: Any, chat: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a conversation, and the mask of those that are learned."""

    def render(count: int, ask: bool = False) -> str:
        return preprocessor.apply_chat_template(chat[:count], add_generation_prompt=ask)

    turns = [i for i, x in enumerate(chat) if x.get("role") == "assistant"]
    texts = [render(len(chat))]
    # The prompt of each turn, and what there is at its end: both begin the whole.
    texts += [text for i in turns for text in (render(i, True), render(i + 1))]
    tokens = [[*map(int, row)] for row in preprocessor.tokenizer(texts)]
    whole, learned, stop = tokens[0], np.zeros(len(tokens[0]), bool), None
    for k, turn in enumerate(turns):
        pair = slice(2 * k + 1, 2 * k + 3)
        (prompt, through), (before, row) = texts[pair], tokens[pair]
        start = _common(before, whole)
        stops = (
            i for i in range(start, len(row)) if row[i] in preprocessor.stop_token_ids
        )
        stop = next(stops, None)
        if stop is None:
            end, same = _common(row, whole), texts[0].startswith(through)
        else:
            # What the template writes after it is not generated.
            end, same = stop + 1, row[: stop + 1] == whole[: stop + 1]
        if not through.startswith(prompt):
            raise _differs(turn, prompt, through)
        if not same:
            raise _differs(turn, through, texts[0])
        learned[start:end] = True
    ends = stop is None and bool(learned[-1:].any())
    return _with_ends(preprocessor, whole, learned, ends)


def _with_ends(
    preprocessor: Any, tokens: list[int], learned: np.ndarray, ends: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask with the start and the end token, where these lack."""
    before, after = [preprocessor.start_token_id], [preprocessor.end_token_id]
    if not preprocessor.add_start_token or tokens[:1] == before or before == [None]:
        before = []
    if not ends or not preprocessor.add_end_token or after == [None]:
        after = []
    learned = np.pad(learned, (len(before), 0))
    learned = np.pad(learned, (0, len(after)), constant_values=True)
    return np.asarray(before + tokens + after, "int32"), learned


def _differs(turn: int, begun: str, text: str) -> ValueError:
    """Returns the error that a text goes on otherwise than it was begun."""
    place = _common(begun, text)
    parts = [repr(x[place : place + 40]) for x in (begun, text)]
    return ValueError(
        f"The chat template changes what it has written before, at message {turn}: "
        f"first {parts[0]}, with what follows {parts[1]} in its place. (Some drop "
        "thinking from earlier answers.) So what would be learned is not what is "
        "generated. Set `preprocessor.chat_template` to one that keeps all it has "
        "written, or pass conversations with one answer."
    )


def _common(a: Any, b: Any) -> int:
    """Returns how many items two sequences have in common at their start."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b))
    )
