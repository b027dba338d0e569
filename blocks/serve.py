"""Serves a model over HTTP, as OpenAI's clients ask for it.

    python -m blocks.serve FOLDER                    # a preset, or a published checkpoint
    python -m blocks.serve FOLDER --port 8000 --api-key SECRET

It needs `pip install ".[serve]"`. The key is also read from `BLOCKS_API_KEY`.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np


def make_app(
    lm: Any, name: str, api_key: str | None, limits: Any, **options: Any
) -> Any:
    """Returns the ASGI application that serves a model, and its `blocks.Server`.

    Args:
        lm: a `blocks.CausalLM` with a preprocessor, compiled.
        name: str. The model's name.
        api_key: str or `None`. What clients must send.
        limits: a `blocks.serving.http_types.Limits`.
        **options: of `lm.serve`.
    """
    from blocks.serving.http import create_app

    if lm.preprocessor is None:
        raise ValueError(
            "The model has no preprocessor, so it can't read and write text."
        )

    def to_text(token: int) -> str:
        array = np.array([[token]], "int32")
        mask = np.ones_like(array)
        texts = lm.preprocessor.generate_postprocess(
            {"token_ids": array, "padding_mask": mask}
        )
        return str(texts[0])

    server = lm.serve(**options)
    app = create_app(server, name, lm.apply_chat_template, to_text, api_key, limits)
    return app, server


def parse_arguments() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m blocks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("preset", help="a folder, a GGUF file or an hf:// handle")
    add("--name", help="the model's name; by default the last part of `preset`")
    add("--dtype", help="such as bfloat16")
    add("--host", default="127.0.0.1", help="default: this machine alone")
    add("--port", type=int, default=8000)
    add("--api-key", default=os.environ.get("BLOCKS_API_KEY"))
    add("--max-rows", type=int, default=8, help="requests that run at once")
    add("--max-length", type=int, default=1024, help="tokens of a request")
    add("--max-waiting", type=int, default=256, help="requests that wait")
    add("--max-logprobs", type=int, default=5)
    add("--max-new-tokens", type=int)
    add("--grammars", action="store_true", help='JSON schemas; needs ".[grammar]"')
    add("--max-seconds", type=float, default=600.0)
    add("--max-body", type=int, default=4 * 2**20, help="in bytes")
    return parser.parse_args()


def main() -> None:
    """Loads the model, and serves it until it is stopped."""
    import uvicorn

    from blocks import CausalLM
    from blocks.serving.http_types import Limits

    options = parse_arguments()
    name = options.name or os.path.basename(os.path.normpath(options.preset))
    lm = CausalLM.from_preset(options.preset, dtype=options.dtype)
    if lm.sampler is None:
        lm.compile()
    limits = Limits(
        options.max_body, options.max_new_tokens, seconds=options.max_seconds
    )
    app, server = make_app(
        lm,
        name,
        options.api_key,
        limits,
        max_rows=options.max_rows,
        max_length=options.max_length,
        max_waiting=options.max_waiting,
        max_logprobs=options.max_logprobs,
        grammars=options.grammars,
    )
    # Longer than clients keep a connection that is idle: one that is closed while a client
    # sends its next request would be an error for it.
    how = {"host": options.host, "port": options.port, "timeout_keep_alive": 75}
    with server:
        uvicorn.run(app, **how)


if __name__ == "__main__":
    main()
