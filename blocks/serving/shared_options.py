"""The options of requests, in the one form for which a running batch is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blocks.generation.options import (
    Options,
    check_processors,
    read_options,
    with_all,
)
from blocks.generation.processors import LogitsProcessor, Switched

# How many tokens a request may have a `logit_bias` for.
_BIASES = 64


def shared_options(
    options: Mapping[str, Any],
    task: Any,
    sampler: Any,
    rows: int,
    max_logprobs: int | None,
    grammars: bool,
    processors: Sequence[LogitsProcessor] = (),
) -> Options:
    """Returns the options of rows, with neutral values of all that is not given.

    Args:
        options: what a request asks for.
        task: the `blocks.CausalLM`.
        sampler: the one that it was compiled with.
        rows: int. How many rows have these.
        max_logprobs: int or `None`. The most `return_logprobs`.
        grammars: bool. Whether there may be a `grammar`.
        processors: those that a request may have.

    Raises:
        TypeError: if an option is not known, or of the wrong type.
        ValueError: if it is not allowed.
    """
    chosen = check_processors(options.get("processors") or ())
    if not all(any(x is y for y in processors) for x in chosen):
        raise ValueError(
            "The `processors` of a request must be among those that the server was made "
            "with, as they are compiled into the batch that all requests share: "
            "`lm.serve(processors=[...])`."
        )
    switched = [
        Switched(x, np.full((rows,), any(x is y for y in chosen))) for x in processors
    ]
    options = {**options, "processors": switched}
    if len(options.get("logit_bias") or ()) > _BIASES:
        raise ValueError(
            f"A request has a `logit_bias` for at most {_BIASES} tokens. Received: "
            f"{len(options['logit_bias'])}"
        )
    if grammars:
        # A mask for each row, which allows any text without one.
        options = {**options, "grammar": [options.get("grammar")] * rows}
    elif options.get("grammar") is not None:
        raise ValueError(
            "The server takes no `grammar`. Make it with `lm.serve(grammars=True)`, or "
            "`python -m blocks.serve --grammars`."
        )
    given = with_all(options, task, sampler)
    how = read_options(given, task, sampler, rows, biases=_BIASES)
    if how.top is not None and (max_logprobs is None or how.top > max_logprobs):
        raise ValueError(
            f"`return_logprobs` must be at most the server's max_logprobs={max_logprobs}. "
            f"Received: return_logprobs={how.top}"
        )
    return dataclasses.replace(how, top=max_logprobs)
