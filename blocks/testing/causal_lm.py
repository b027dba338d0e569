"""The check of generation that users run on their own causal language models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import keras

from attention.contract.arguments import check_positive_int, describe
from attention.testing.backends import full_precision
from attention.testing.running import run_in_order, select
from blocks.testing.generation_checks import (
    check_beam,
    check_greedy,
    check_lengths,
    check_own_sampler,
    check_ragged_batch,
    check_sampling,
    check_stop_tokens,
    check_weights,
)
from blocks.testing.generation_session import Session

# A mistake often fails several checks. The ones that say most about it come first.
CHECKS: dict[str, Callable[[Session], None]] = {
    "lengths": check_lengths,
    "greedy": check_greedy,
    "ragged_batch": check_ragged_batch,
    "stop_tokens": check_stop_tokens,
    "weights": check_weights,
    "beam": check_beam,
    "sampling": check_sampling,
    "own_sampler": check_own_sampler,
}


def check_causal_lm(
    make_lm: Callable[[], Any],
    *,
    prompts: Iterable[Iterable[int]] | None = None,
    max_new_tokens: int = 8,
    num_beams: int = 3,
    seed: int = 0,
    checks: Any = None,
) -> dict[str, float]:
    """Checks that a causal language model generates what it computes.

    The outputs of the model called on all tokens, without a cache, are the
    reference for all that `generate` returns:

    - `lengths`: each row keeps to `max_new_tokens` and `max_length`, and prompts
      come back unchanged.
    - `greedy`: each prompt alone gives the likeliest token at every step.
    - `ragged_batch`: prompts of different lengths in one batch give what each
      gives alone.
    - `stop_tokens`: each row ends with its own first stop token; the others go
      on unchanged.
    - `weights`: weights assigned between two calls count in the second.
    - `beam`: beam search finds the best beam of a search without a cache.
    - `sampling`: a seed gives the same tokens again, and top-k likely ones.
    - `own_sampler`: a `Sampler` with only `get_next_token` is obeyed.

    Tokens whose logits are equal but for rounding are as good as each other.
    The checks need no test framework. They set Keras's random seed, and add
    noise to all trainable weights, as much as it takes for continuations not
    to be one token again and again, so that what starts at zero counts.

    Args:
        make_lm: a function without arguments that makes a new `CausalLM`: a
            Keras model called on `token_ids` and `padding_mask`, with
            `compile(sampler=...)` and `generate(inputs, stop_token_ids=...,
            max_new_tokens=..., max_length=...)`.
        prompts: lists of token ids. The default is four random ones of 1 to 18
            tokens, shorter where the model knows fewer positions.
        max_new_tokens: int. How many tokens each prompt is continued by. Where
            a window or a chunk is longer than 18 tokens, pass a larger number
            or longer prompts.
        num_beams: int. For beam search.
        seed: int. Of weights, prompts and samplers.
        checks: names of the checks to run; `None` means all.

    Returns:
        A dict from each check to the largest difference that was found: of the
        logits of two tokens, or of the log probabilities of two beams.

    Raises:
        ConformanceError: an `AssertionError` that names the first check that
            failed, the largest difference and where it is.
        TypeError: if `make_lm` makes no such model, or an argument has the
            wrong type.
        ValueError: if an argument is out of range.

    Example:

    >>> from blocks.testing import check_causal_lm
    >>> from blocks import CausalLM, CustomBackbone
    >>> report = check_causal_lm(
    ...     lambda: CausalLM(
    ...         CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32)
    ...     ),
    ...     checks=["lengths", "greedy"],
    ... )
    >>> sorted(report), max(report.values()) < 1e-3
    (['greedy', 'lengths'], True)
    """
    names = select(checks, CHECKS)
    check_positive_int("max_new_tokens", max_new_tokens)
    check_positive_int("num_beams", num_beams)
    if not callable(make_lm) or isinstance(make_lm, keras.layers.Layer):
        raise TypeError(
            "`make_lm` must be a function without arguments that makes a new model, "
            f"such as `lambda: CausalLM(backbone)`. Received: {describe(make_lm)}"
        )
    with full_precision():
        keras.utils.set_random_seed(seed)
        lm = make_lm()
        _check_lm(lm)
        session = Session(lm, prompts, max_new_tokens, num_beams, seed)
        return run_in_order(names, lambda name: CHECKS[name](session), session)


def _check_lm(lm: Any) -> None:
    """Raises a TypeError if a model has not the methods that are used."""
    if not isinstance(lm, keras.Model) or not callable(getattr(lm, "generate", None)):
        raise TypeError(
            "`make_lm` must return a causal language model: a `keras.Model` with "
            f"`generate`, such as `blocks.CausalLM`. It returned {describe(lm)}."
        )
    parameters = inspect.signature(lm.generate).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    wanted = ("stop_token_ids", "max_new_tokens", "max_length")
    missing = [name for name in wanted if name not in parameters]
    if missing and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise TypeError(
            f"`generate` of {describe(lm)} must take {', '.join(wanted)}, as that of "
            f"`blocks.CausalLM` does. It does not take {', '.join(missing)}."
        )
