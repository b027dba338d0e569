"""A causal language model, and its continuations with a cache and without."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import describe
from attention.contract.cached_model import call_sites, max_positions
from attention.contract.inner_layers import all_layers
from attention.testing.backends import to_numpy, without_gradients
from attention.testing.running import Checked

Rows = list[list[int]]

# Of the default prompts: a single token, some past 16, two of the same length.
_LENGTHS = (5, 18, 1, 18)
# The gap between two logits that counts as a tie, for logits of size 1, by the
# lowest dtype that is computed in.
_TOLERANCES = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
# Noise on the weights: the first of these sizes with which greedy tokens vary is used.
_NOISES = (0.1, 0.3, 0.6)
# Rows of tokens of which the model is asked for logits in one call, at most.
_MAX_ROWS = 64


@dataclasses.dataclass
class Choice:
    """A token that was chosen, and the one that the model without a cache wants.

    `gap` is by how much their logits differ, and `allowed` what counts as a tie.
    """

    row: int
    step: int
    prefix: list[int]
    chosen: int
    expected: int
    gap: float
    allowed: float

    @property
    def is_wrong(self) -> bool:
        return not self.gap <= self.allowed  # NaN is wrong, too

    def __str__(self) -> str:
        return (
            f"row {self.row} (a prompt of {len(self.prefix) - self.step} tokens), "
            f"step {self.step} (after a prefix of {len(self.prefix)} tokens): token "
            f"{self.chosen} was chosen, expected was {self.expected}; without a "
            f"cache their logits differ by {self.gap:.3g} (allowed: "
            f"{self.allowed:.2g})"
        )


class Session(Checked):
    """A model whose tokens vary, prompts, and both ways of continuing them.

    The arguments are those of `check_causal_lm`.
    """

    def __init__(
        self, lm: Any, prompts: Any, new_tokens: int, num_beams: int, seed: int
    ) -> None:
        self.made, self.seed = lm, seed
        self.new_tokens, self.num_beams = new_tokens, num_beams
        self._sampler: Any = None
        self._forward = _make_forward(lm)
        self.vocabulary_size = int(self._forward(pad([[0]])).shape[-1])
        if not num_beams < self.vocabulary_size:
            raise ValueError(
                "`num_beams` must be smaller than the vocabulary of "
                f"{self.vocabulary_size} tokens. Received: num_beams={num_beams}"
            )
        self.prompts = read_prompts(
            prompts, self.vocabulary_size, max_length(lm), new_tokens, seed
        )
        self.longest = max(map(len, self.prompts))
        # One shape for all calls without a cache: JAX compiles each new one.
        rows = min(_MAX_ROWS, len(self.prompts) * num_beams)
        self._shape = (rows, self.longest + new_tokens)
        dtypes = {getattr(x, "compute_dtype", "float32") for x in all_layers(lm)}
        self.tolerance = max(_TOLERANCES.get(x, 0.0) for x in (*dtypes, "float32"))
        self._initial = [to_numpy(v) for v in lm.trainable_variables]
        self._add_noise()

    # === Weights ===

    def set_weights(self, draw: int = 0) -> None:
        """Sets the weights the model was made with, plus the noise of a draw."""
        rng = np.random.default_rng([self.seed, self._first_draw + draw])
        for variable, value in zip(self.made.trainable_variables, self._initial):
            # Much noise on what is added to every token, or on the vocabulary,
            # would make one token the likeliest whatever came before it.
            small = value.ndim < 2 or self.vocabulary_size in value.shape
            noise = rng.normal(scale=0.1 if small else self._noise, size=value.shape)
            if value.dtype.kind == "f":
                variable.assign(ops.cast(value + noise, variable.dtype))

    def _add_noise(self) -> None:
        """Adds noise to the weights with which greedy continuations vary."""
        found = []
        for self._noise in _NOISES:
            for self._first_draw in range(2):
                self.set_weights()
                rows = [list(prompt) for prompt in self.prompts]
                for _ in range(self.new_tokens):
                    for row, scores in zip(rows, self.logits(rows)):
                        row.append(int(scores.argmax()))
                new = [row[-self.new_tokens :] for row in rows]
                counts = np.bincount(np.concatenate(new))
                value = sum(len(set(row)) for row in new) - int(counts.max())
                found.append((value, self._noise, self._first_draw))
                if 4 * value >= counts.sum():
                    return
        _, self._noise, self._first_draw = max(found)
        self.set_weights()

    # === Without a cache ===

    def logits(self, prefixes: Rows) -> np.ndarray:
        """Returns the logits after each prefix, of shape `(len(prefixes), vocabulary)`.

        They are from calls of the model on all tokens, without a cache.
        """
        before, parts = self.doing, []
        self.doing = f"called on tokens of shape {self._shape}, without a cache"
        for start in range(0, len(prefixes), self._shape[0]):
            some = prefixes[start : start + self._shape[0]]
            filled = [*some, *[some[0]] * (self._shape[0] - len(some))]
            outputs = self._forward(pad(filled, self._shape[1]))
            ends = [len(prefix) - 1 for prefix in some]
            parts.append(to_numpy(outputs)[np.arange(len(some)), ends])
        self.doing = before
        return np.concatenate(parts).astype("float64")

    def choices(self, new: Rows, rank: int = 0, at_least: bool = False) -> list[Choice]:
        """Compares each new token with the logits after the tokens before it.

        The token of this rank should have been chosen (0 is the likeliest), or a likelier
        one if `at_least`.
        """
        places = [(row, step) for row, x in enumerate(new) for step in range(len(x))]
        prefixes = [self.prompts[row] + new[row][:step] for row, step in places]
        found = []
        for (row, step), prefix, logits in zip(places, prefixes, self.logits(prefixes)):
            chosen, expected = (
                new[row][step],
                int(np.argsort(-logits, kind="stable")[rank]),
            )
            choice = self._choice(row, prefix, logits, chosen, expected)
            if at_least and logits[chosen] > logits[expected]:
                choice.gap = 0.0
            found.append(choice)
        return found

    def divergences(self, actual: Rows, expected: Rows) -> list[Choice]:
        """Returns where each row first differs from the expected one, if it does."""
        found = []
        for row, (new, wanted) in enumerate(zip(actual, expected)):
            differ = (i for i, (a, b) in enumerate(zip(new, wanted)) if a != b)
            step = next(differ, None)
            if step is not None:
                prefix = self.prompts[row] + wanted[:step]
                logits = self.logits([prefix])[0]
                found.append(self._choice(row, prefix, logits, new[step], wanted[step]))
        return found

    def _choice(
        self, row: int, prefix: list[int], logits: np.ndarray, chosen: int, wanted: int
    ) -> Choice:
        step = len(prefix) - len(self.prompts[row])
        gap = abs(float(logits[wanted] - logits[chosen]))
        size = np.abs(logits[np.isfinite(logits)]).max(initial=1.0)
        allowed = self.tolerance * float(size)
        return Choice(row, step, prefix, chosen, wanted, gap, allowed)

    # === With a cache ===

    def compile(self, sampler: Any) -> None:
        """Sets the sampler. The same name again leaves what is compiled alone."""
        if not isinstance(sampler, str) or sampler != self._sampler:
            self._sampler = sampler
            name = sampler if isinstance(sampler, str) else type(sampler).__name__
            self.doing = f"compiled with the sampler {name!r}"
            self.made.compile(sampler=sampler)

    def generate(self, prompts: Any = None, stops: Any = None, **limits: Any) -> Rows:
        """Returns the new tokens of each row that `lm.generate` gives."""
        prompts = prompts or self.prompts
        limits = limits or {"max_new_tokens": self.new_tokens}
        arguments = {"stop_token_ids": stops, **limits}
        said = ", ".join(f"{key}={value}" for key, value in arguments.items())
        lengths = ", ".join(str(len(prompt)) for prompt in prompts)
        self.doing = (
            f"asked to `generate(..., {said})` with prompts of {lengths} tokens"
        )
        outputs = self.made.generate(pad(prompts), **arguments)
        rows = read_outputs(outputs, len(prompts))
        if rows is None:
            self.complain(
                "`generate` must return a dict of `token_ids` and `padding_mask` of "
                f"shape ({len(prompts)}, length), padded on the right. It returned "
                f"{describe(outputs)}."
            )
        for i, (row, prompt) in enumerate(zip(rows, prompts)):
            if row[: len(prompt)] != prompt:
                self.complain(
                    "`generate` must return each prompt unchanged, with the new "
                    f"tokens after it. Row {i} has the prompt {prompt}, but begins "
                    f"with {row[: len(prompt)]}."
                )
            wrong = [x for x in row if not 0 <= x < self.vocabulary_size]
            if wrong:
                self.complain(
                    f"Row {i} has the token {wrong[0]}, which is outside of the "
                    f"vocabulary of {self.vocabulary_size} tokens."
                )
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]

    @functools.cached_property
    def alone(self) -> Rows:
        """The greedy continuation of each prompt, one at a time."""
        self.compile("greedy")
        return [self.generate([prompt])[0] for prompt in self.prompts]

    @functools.cached_property
    def batch(self) -> Rows:
        """The greedy continuations of all prompts in one batch."""
        self.compile("greedy")
        return self.generate()

    # === Failures ===

    def complain(
        self, message: str, advice: str = "", gap: float | None = None
    ) -> NoReturn:
        advice = f"\n  {advice}" if advice else ""
        self.fail(f"{message}\n  It was the {self}, {self.doing}.{advice}", gap)

    def require(self, choices: list[Choice], claim: str, advice: Any) -> None:
        """Notes the largest gap, and fails if one is not a tie.

        `advice` is what to look at, or a function of the wrong choices that returns it.
        """
        wrong = [choice for choice in choices if choice.is_wrong]
        if wrong:
            rows = sorted({choice.row for choice in wrong})
            gap = max(choice.gap for choice in wrong)
            message = (
                f"{claim}\n  First difference: {wrong[0]}.\n  Largest difference: "
                f"{gap:.3g}. Wrong: {len(wrong)} of {len(choices)} tokens compared, "
                f"in rows {rows} of {len(self.prompts)}."
            )
            advice = advice(wrong) if callable(advice) else advice
            self.complain(message, advice, gap)
        self.largest = max([self.largest, *(choice.gap for choice in choices)])


def _make_forward(lm: Any) -> Callable:
    """Returns the full forward pass, which reads the current weights."""
    if keras.config.backend() != "jax":
        return without_gradients(lambda x: lm(x, training=False))
    import jax

    # Compiled: operation by operation it would take many times as long.
    @jax.jit
    def run(trainable: list, others: list, inputs: Any) -> Any:
        return lm.stateless_call(trainable, others, inputs, training=False)[0]

    def forward(inputs: Any) -> Any:
        groups = (lm.trainable_variables, lm.non_trainable_variables)
        return run(*([v.value for v in group] for group in groups), inputs)

    return forward


def pad(rows: Rows, width: int | None = None) -> dict[str, np.ndarray]:
    """Returns tokens as a model takes them, padded on the right."""
    shape = (len(rows), width or max(map(len, rows)))
    padded = {key: np.zeros(shape, "int32") for key in ("token_ids", "padding_mask")}
    for i, row in enumerate(rows):
        padded["token_ids"][i, : len(row)] = row
        padded["padding_mask"][i, : len(row)] = 1
    return padded


def max_length(lm: Any) -> int | None:
    """Returns how many positions a model knows, or `None` if that is not known."""
    backbone = getattr(lm, "backbone", lm)
    limits = [getattr(backbone, "max_sequence_length", None)]
    # The model need not be made of our cached layers.
    with contextlib.suppress(TypeError, ValueError):
        limits.append(max_positions(call_sites(backbone)))
    return min((x for x in limits if x), default=None)


def read_prompts(
    prompts: Any, vocabulary_size: int, limit: int | None, new_tokens: int, seed: int
) -> Rows:
    """Returns the prompts as lists, or random ones of different lengths."""
    room = None if limit is None else limit - new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"The model knows {limit} positions, which is too few for a prompt and "
            f"{new_tokens} new tokens. Pass a smaller `max_new_tokens`."
        )
    if prompts is None:
        rng = np.random.default_rng(seed)
        lengths = [length if room is None else min(length, room) for length in _LENGTHS]
        # 0 is what pads, in many models.
        low = min(1, vocabulary_size - 1)
        return [rng.integers(low, vocabulary_size, n).tolist() for n in lengths]
    wanted = "`prompts` must be a list of prompts, each a list of token ids"
    try:
        rows = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:
        raise TypeError(f"{wanted}. Received: prompts={describe(prompts)}") from None
    if not rows or not all(rows):
        raise ValueError(f"{wanted}, at least one. Received: prompts={prompts!r}")
    for row in rows:
        if not 0 <= min(row) <= max(row) < vocabulary_size:
            raise ValueError(
                f"`prompts` must be within the model's vocabulary of {vocabulary_size} "
                f"tokens. Received tokens from {min(row)} to {max(row)}."
            )
        if room is not None and len(row) > room:
            raise ValueError(
                f"The model knows {limit} positions, so with {new_tokens} new tokens "
                f"a prompt may have {room}. `prompts` has one of {len(row)}."
            )
    return rows


def read_outputs(outputs: Any, rows: int) -> Rows | None:
    """Returns the real tokens of each row, or `None` if the outputs are malformed."""
    keys = ("token_ids", "padding_mask")
    if not isinstance(outputs, dict) or not set(keys) <= set(outputs):
        return None
    tokens, mask = (np.asarray(to_numpy(outputs[key])) for key in keys)
    if tokens.shape != mask.shape or tokens.ndim != 2 or len(tokens) != rows:
        return None
    mask = mask.astype(bool)
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        return None
    return [row[real].tolist() for row, real in zip(tokens, mask)]
