"""Chat with a published model in the terminal.

    python examples/chat.py                      # SmolLM2-135M, fetched the first time
    python examples/chat.py path/or/hf://handle  # a folder, a GGUF file or a handle
    python examples/chat.py --quick              # two turns of a tiny untrained model

The answer is printed as it is generated. The conversation is a session: its KV cache is
kept, and a turn processes only what is new. Ctrl-C stops the answer, not the program.
`/reset` forgets the conversation, `/save FILE` writes it as JSON, `/quit` ends.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import fetch
import keras_hub

from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone

TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


class Chat:
    """A conversation with a model."""

    def __init__(self, lm, system=None):
        self.lm, self.system = lm, system
        self.reset()

    def reset(self):
        """Forgets the conversation."""
        system = {"role": "system", "content": self.system}
        self.messages = [system] if self.system else []
        self.session = None

    def answer(self, text, max_new_tokens):
        """Yields the answer to a message, in pieces."""
        self.messages.append({"role": "user", "content": text})
        prompt = self.lm.apply_chat_template(self.messages)
        try:
            if self.session is None:
                self.session = self.lm.start(prompt)
            else:
                self.session.rewrite(prompt)
        except ValueError:
            # A recurrent state can't be taken back to where the two differ.
            self.session = self.lm.start(prompt)
        pieces = []
        try:
            for piece in self.session.stream(max_new_tokens=max_new_tokens):
                pieces.append(piece)
                yield piece
        finally:
            # Also where it was stopped: what was said was said.
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def save(self, path):
        """Writes the conversation as JSON."""
        content = json.dumps(self.messages, indent=2, ensure_ascii=False)
        pathlib.Path(path).write_text(content + "\n", encoding="utf-8")


def say(chat, text, max_new_tokens):
    """Prints the answer as it comes, and how fast it came."""
    start, first, count = time.perf_counter(), None, 0
    before = 0 if chat.session is None else chat.session.num_prefilled
    pieces = chat.answer(text, max_new_tokens)
    try:
        for piece in pieces:
            first = first or time.perf_counter() - start
            print(piece, end="", flush=True)
            count += 1
    except KeyboardInterrupt:
        pieces.close()
        print(" [stopped]", end="")
    seconds = time.perf_counter() - start
    processed = chat.session.num_prefilled - min(before, chat.session.num_prefilled)
    print(
        f"\n[{processed} tokens processed, first piece after {first or seconds:.2f} s, "
        f"{count / seconds:.1f} pieces/s]"
    )


def converse(chat, max_new_tokens):
    """Reads and answers messages until the input ends."""
    while True:
        try:
            text = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/save"):
            path = text.removeprefix("/save").strip() or "chat.json"
            chat.save(path)
            print(f"[saved to {path}]")
        elif text:
            say(chat, text, max_new_tokens)


def tiny_model():
    """Returns a model that has learned nothing, which speaks in bytes."""
    backbone = CustomBackbone(256, 2, 4, 32, 64, max_sequence_length=512)
    preprocessor = CausalLMPreprocessor(
        keras_hub.tokenizers.ByteTokenizer(),
        sequence_length=512,
        end_token=1,
        chat_template=TEMPLATE,
    )
    return CausalLM(backbone, preprocessor)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", help="default: SmolLM2-135M-Instruct")
    add("--system", help="what the model is told first")
    add("--new-tokens", type=int, default=256, help="the longest answer")
    add("--dtype", default=None, help="float32, bfloat16 or float16")
    add("--sampler", default="greedy", help="a name of a KerasHub sampler")
    add("--quick", action="store_true", help="two turns of a tiny model")
    options = parser.parse_args()
    if options.quick:
        lm = tiny_model()
    else:
        path = options.checkpoint or str(fetch.model())
        lm = CausalLM.from_preset(path, dtype=options.dtype)
    lm.compile(sampler=options.sampler)
    chat = Chat(lm, options.system)
    if not options.quick:
        converse(chat, options.new_tokens)
        return
    for text in ("Hello!", "And then?"):
        print(f"> {text}")
        say(chat, text, max_new_tokens=8)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


if __name__ == "__main__":
    main()
