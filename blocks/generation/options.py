"""Options of one call of `generate`, `stream`, sessions and loops of one's own."""

from __future__ import annotations

import dataclasses
import numbers
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypedDict

import keras
import keras_hub
import numpy as np

from attention.contract import describe
from blocks.generation.endings import read_stop_strings
from blocks.generation.grammar import GrammarMask, read_grammar
from blocks.generation.processors import (
    FrequencyPenalty,
    LogitBias,
    LogitsProcessor,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
)
from blocks.generation.prompts import vocabulary_size

_samplers = keras_hub.samplers


class GenerationOptions(TypedDict, total=False):
    """Options of one call: keyword arguments of `generate`, `stream` and sessions.

    Each but `processors` and `return_logprobs` may be one value for all prompts, or a list
    with one for each. A call with other numbers compiles nothing anew.

    The order is that of transformers, and so is what the numbers mean: the processors
    change the logits (`repetition_penalty`, `presence_penalty`, `frequency_penalty`,
    `no_repeat_ngram_size`, `logit_bias`, then `processors` in their order); these are divided by
    `temperature`, and filtered by `top_k`, `top_p` and `min_p`. With none of these four,
    the sampler that the model was compiled with chooses. With one of them, the others are
    those of that sampler, if it is `"greedy"` (whose temperature is 1), `"random"`,
    `"top_k"` or `"top_p"`. What a call leaves out is as in `lm.generation_options`.

    Example:

    >>> import numpy as np
    >>> from blocks import CausalLM, CustomBackbone
    >>> lm = CausalLM(CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32))
    >>> lm.compile(sampler="greedy")
    >>> options = dict(stop_token_ids=None, max_new_tokens=4)
    >>> prompts = [[1, 2, 3], [1, 2, 3]]
    >>> out = lm.generate(prompts, **options, temperature=[0.8, 1.2], seed=7)
    >>> again = lm.generate(prompts[1:], **options, temperature=1.2, seed=7)
    >>> bool((out["token_ids"][1] == again["token_ids"][0]).all())
    True
    """

    temperature: Any
    """float, at least 0. 0 takes the likeliest token."""

    top_k: Any
    """int. How many of the likeliest tokens may be drawn; 0 means all."""

    top_p: Any
    """float in (0, 1]. The likeliest tokens that together have this probability may be."""

    min_p: Any
    """float in [0, 1]. Tokens at least so many times as likely as the likeliest may be."""

    seed: Any
    """int of 64 bits. A row's tokens depend on its seed, and not on its batch. Of
    several continuations of a prompt each has random numbers of its own. It needs one of
    the options above, or a sampler that draws."""

    repetition_penalty: Any
    """float, larger than 0. Divides the logits of tokens in the row, its prompt
    included; 1 changes nothing."""

    presence_penalty: Any
    """float. It is subtracted from the logits of tokens generated before."""

    frequency_penalty: Any
    """float. It is subtracted for each time that a token was generated before."""

    no_repeat_ngram_size: Any
    """int. No sequence of so many tokens comes twice in a row; 0 means any may."""

    logit_bias: Any
    """dict of tokens and what is added to their logits, or `None`."""

    grammar: Any
    """What the answer keeps to: a dict (a JSON schema), an `re.Pattern`, or a string (a
    Lark grammar); `None` for any text. It needs `pip install ".[grammar]"`."""

    processors: Any
    """list of `blocks.LogitsProcessor`."""

    stop: Any
    """str or a list of str; for several prompts also a list of such lists. The text of a
    row ends before the first of these that is generated, also where several tokens make
    it up. A session has it among its tokens."""

    return_logprobs: Any
    """int. Returns `blocks.Completion`s, with the log-probabilities of the new tokens and
    of so many of the likeliest tokens."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a call, checked, with a number for each row.

    Attributes:
        numbers: arrays `(rows,)` by the names of what `Sampling` draws with, or empty if
            the compiled sampler chooses.
        processors: the `LogitsProcessor`s.
        stop: for each row its stop strings, or empty.
        top: how many likeliest tokens to tell, or `None` for no log-probabilities.
    """

    numbers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    processors: tuple[LogitsProcessor, ...] = ()
    stop: tuple[tuple[str, ...], ...] = ()
    top: int | None = None


NO_OPTIONS = Options()

# Keras's generators read and then write their state: two threads may draw the same.
_drawing_seeds = threading.Lock()

# Options that draw, and what leaves the choice as it is.
_DRAWING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_COUNTS = "from 0 to 2**31 - 1"


def _is_count(x: np.ndarray) -> np.ndarray:
    return (x >= 0) & (x < 2**31)


def _is_seed(x: np.ndarray) -> np.ndarray:
    return (x >= -(2**63)) & (x < 2**64)


_ALLOWED: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, type]] = {
    "temperature": (lambda x: x >= 0, "at least 0", numbers.Real),
    "top_k": (_is_count, _COUNTS, numbers.Integral),
    "top_p": (lambda x: (x > 0) & (x <= 1), "larger than 0, at most 1", numbers.Real),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "from 0 to 1", numbers.Real),
    "seed": (_is_seed, "from -2**63 to 2**64 - 1", numbers.Integral),
    "repetition_penalty": (lambda x: x > 0, "larger than 0", numbers.Real),
    "presence_penalty": (np.isfinite, "finite", numbers.Real),
    "frequency_penalty": (np.isfinite, "finite", numbers.Real),
    "no_repeat_ngram_size": (_is_count, _COUNTS, numbers.Integral),
}
_PENALTIES: dict[str, Callable[[np.ndarray], LogitsProcessor]] = {
    "repetition_penalty": RepetitionPenalty,
    "presence_penalty": PresencePenalty,
    "frequency_penalty": FrequencyPenalty,
    "no_repeat_ngram_size": NoRepeatNgram,
}


def read_options(
    options: Mapping[str, Any],
    task: Any,
    sampler: Any,
    count: int,
    times: int = 1,
    biases: int = 8,
) -> Options:
    """Returns the options of a call for `count` prompts, `times` rows for each.

    `biases` is the smallest number of tokens with a `logit_bias` that is compiled for.

    Raises:
        TypeError: if an option is not known, or of the wrong type.
        ValueError: if a number is not allowed, a list has not one value for each prompt,
            or the sampler does not go with an option.
    """
    _check_names(options, GenerationOptions.__annotations__)
    given = _given(options, task)
    values = {
        name: np.repeat(_numbers(name, given[name], count), times)
        for name in _ALLOWED
        if name in given
    }
    processors = [make(values[x]) for x, make in _PENALTIES.items() if x in values]
    if "logit_bias" in given:
        processors.append(_logit_bias(given["logit_bias"], task, count, times, biases))
    processors += check_processors(given.get("processors", ()))
    if given.get("grammar") is not None:
        each = _each("grammar", given["grammar"], count)
        grammars = [read_grammar(x, task) for x in each]
        of_rows = [x for x in grammars for _ in range(times)]
        processors.append(GrammarMask(of_rows, task))
    top = check_top(given.get("return_logprobs"), task)
    stop = (
        read_stop_strings(given["stop"], task, count, times) if "stop" in given else ()
    )
    drawing = _drawing(values, sampler, count * times, times)
    return Options(drawing, tuple(processors), stop, top)


def with_all(options: Mapping[str, Any], task: Any, sampler: Any) -> dict[str, Any]:
    """Returns options with neutral values of those that are not given.

    So the compiled steps for all of them are the same.
    """
    given = _given(options, task)
    neutral: dict[str, Any] = {
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "no_repeat_ngram_size": 0,
        "logit_bias": {},
    }
    if type(sampler) is _samplers.GreedySampler and not draws(given):
        neutral["temperature"] = 0.0
    elif not draws(given):
        neutral["top_p"] = getattr(sampler, "p", 1.0)
    return {**neutral, **given}


def _given(options: Mapping[str, Any], task: Any) -> dict[str, Any]:
    """Returns the options of a call, with the model's own where it gives none."""
    given = {name: x for name, x in options.items() if x is not None}
    return {**task.default_options(), **given}


def _check_names(options: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"There is no option `{unknown[0]}` here. The options are {', '.join(known)}."
        )


def check_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's own options, each a number for all rows."""
    _check_names(options, _ALLOWED)
    for name, value in options.items():
        _numbers(name, value, 1)
    return dict(options)


def draws(options: Mapping[str, Any]) -> bool:
    """Returns whether options say how tokens are drawn."""
    return any(name in options for name in _DRAWING)


def check_top(top: Any, task: Any) -> int | None:
    """Returns how many likeliest tokens to tell, or `None` for no log-probabilities."""
    if top is None:
        return None
    if isinstance(top, bool) or not isinstance(top, numbers.Integral):
        raise TypeError(
            "`return_logprobs` must be an integer. Received: "
            f"return_logprobs={describe(top)}"
        )
    size = task.output.shape[-1]
    if not 0 <= int(top) <= size:
        raise ValueError(
            f"`return_logprobs` must be from 0 to {size}, the size of the vocabulary. "
            f"Received: return_logprobs={top}"
        )
    return int(top)


def check_no_logprobs(options: Mapping[str, Any]) -> None:
    """Raises a `ValueError` if log-probabilities are asked for where text is yielded."""
    if options.get("return_logprobs") is not None:
        raise ValueError(
            "`stream` yields text or tokens only. For `return_logprobs` call `generate`."
        )


def _drawing(
    values: dict[str, np.ndarray], sampler: Any, rows: int, times: int
) -> dict[str, np.ndarray]:
    """Returns what to draw with, or nothing if the compiled sampler chooses."""
    asked = [name for name in _DRAWING if name in values]
    kind = type(sampler)
    if not asked and ("seed" not in values or kind is _samplers.GreedySampler):
        return {}
    base: dict[str, Any] = {}
    if kind in (_samplers.RandomSampler, _samplers.TopKSampler, _samplers.TopPSampler):
        base["temperature"] = sampler.temperature
    elif kind is not _samplers.GreedySampler:
        raise ValueError(
            f"`{asked[0] if asked else 'seed'}` can't be combined with the sampler that "
            f"the model was compiled with, a {kind.__name__}. Compile with "
            '"greedy", "random", "top_k" or "top_p", whose numbers these options are.'
        )
    if kind in (_samplers.TopKSampler, _samplers.TopPSampler):
        base["top_k"] = sampler.k or 0
    if kind is _samplers.TopPSampler:
        base["top_p"] = sampler.p
    found = {
        name: values.get(name, np.full((rows,), base.get(name, default)))
        for name, default in _DRAWING.items()
    }
    numbers_of = {
        k: x.astype("int32" if k == "top_k" else "float32") for k, x in found.items()
    }
    seeds = values.get("seed")
    if seeds is None:
        generator = getattr(sampler, "seed_generator", None)
        with _drawing_seeds:
            drawn = keras.random.randint((rows // times,), 0, 2**31 - 1, seed=generator)
        seeds = np.repeat(keras.ops.convert_to_numpy(drawn), times)
    # The upper bits tell the continuations of a prompt apart.
    high = (seeds.astype("int64") >> 32) + np.tile(np.arange(times), rows // times)
    low = seeds.astype("int64") & 0xFFFFFFFF
    both = np.stack([low, high & 0xFFFFFFFF], axis=1).astype("uint32")
    return {**numbers_of, "seed": both.view("int32")}


def _numbers(name: str, value: Any, count: int) -> np.ndarray:
    """Returns an option as an array with a number for each prompt."""
    is_allowed, allowed, kind = _ALLOWED[name]
    given = _each(name, value, count)
    for x in given:
        if isinstance(x, bool) or not isinstance(x, kind):
            what = "integers" if kind is numbers.Integral else "numbers"
            raise TypeError(
                f"`{name}` must be {what[:-1]}, or a list of {what}. Received: "
                f"{name}={describe(value)}"
            )
    # NumPy makes floats of large integers beside negative ones, but not of objects.
    cast, dtype = (int, object) if kind is numbers.Integral else (float, float)
    array = np.array([*map(cast, given)], dtype)
    wrong = np.flatnonzero(~np.asarray(is_allowed(array)))
    if len(wrong):
        raise ValueError(
            f"`{name}` must be {allowed}. Received: {name}={array[wrong[0]]}"
            f"{f' for prompt {wrong[0]}' if count > 1 else ''}"
        )
    if name == "seed":
        return (array % 2**64).astype("uint64")
    return array.astype("int32" if cast is int else "float32")


def _each(name: str, value: Any, count: int) -> list[Any]:
    """Returns a value for each prompt, of one for all or a list of them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"`{name}` must be one value for all prompts, or a list with one for each of "
            f"{count}. Received: {name}={describe(value)}"
        )
    return list(value)


def check_processors(value: Any) -> list[LogitsProcessor]:
    """Returns the processors of the user's argument, one or several."""
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    wrong = [x for x in found if not isinstance(x, LogitsProcessor)]
    if wrong:
        raise TypeError(
            "`processors` must be a list of `blocks.LogitsProcessor`. Received among "
            f"them: {describe(wrong[0])}"
        )
    return found


def _logit_bias(value: Any, task: Any, count: int, times: int, width: int) -> LogitBias:
    each = [x or {} for x in _each("logit_bias", value, count)]
    size = vocabulary_size(task) or task.output.shape[-1]
    for biases in each:
        if not isinstance(biases, Mapping):
            raise TypeError(
                "`logit_bias` must be a dict of tokens and numbers, or a list of them. "
                f"Received: logit_bias={describe(value)}"
            )
        for token, bias in biases.items():
            if not isinstance(token, numbers.Integral) or not 0 <= int(token) < size:
                raise ValueError(
                    "The keys of `logit_bias` must be tokens of the model's vocabulary "
                    f"of {size}. Received: {token!r}"
                )
            if not isinstance(bias, numbers.Real) or not bias < float("inf"):
                raise ValueError(
                    "The values of `logit_bias` must be numbers, at most finite. "
                    f"Received: {bias!r} for token {token}"
                )
    # One of few sizes, as each is compiled.
    while width < max(map(len, each)):
        width *= 2
    token_ids = np.zeros((count, width), "int32")
    biases_of = np.zeros((count, width), "float32")
    for row, biases in enumerate(each):
        token_ids[row, : len(biases)] = list(biases)
        biases_of[row, : len(biases)] = list(biases.values())
    return LogitBias(np.repeat(token_ids, times, 0), np.repeat(biases_of, times, 0))
