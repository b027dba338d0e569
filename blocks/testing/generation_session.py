"""A causal language model, and its continuations with a cache and without."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from attention.contract.arguments import describe
from attention.contract.inner_layers import all_layers
from attention.testing.backends import to_numpy, without_gradients
from attention.testing.running import Checked
from blocks.testing.generation_prompts import (
    Rows,
    max_length,
    pad,
    read_outputs,
    read_prompts,
)

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

    Args:
        lm: a Keras `CausalLM`.
        prompts: lists of token ids, or `None` for random ones.
        new_tokens: int. How many tokens each row gets.
        num_beams: int. For beam search.
        seed: int. Of prompts, noise and samplers.
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

        Args:
            new: the new tokens of each row.
            rank: int. Which token should have been chosen; 0 is the likeliest.
            at_least: bool. Whether likelier tokens are right, too.
        """
        places = [(row, step) for row, x in enumerate(new) for step in range(len(x))]
        prefixes = [self.prompts[row] + new[row][:step] for row, step in places]
        found = []
        for (row, step), prefix, logits in zip(places, prefixes, self.logits(prefixes)):
            expected = int(np.argsort(-logits, kind="stable")[rank])
            choice = self._choice(row, prefix, logits, new[row][step], expected)
            choice.gap = max(0.0, choice.gap) if at_least else abs(choice.gap)
            found.append(choice)
        return found

    def divergences(self, actual: Rows, expected: Rows) -> list[Choice]:
        """Returns where each row first differs from the expected one, if it does."""
        found = []
        for row, (new, wanted) in enumerate(zip(actual, expected)):
            step = next(
                (i for i, (a, b) in enumerate(zip(new, wanted)) if a != b), None
            )
            if step is None:
                continue
            prefix = self.prompts[row] + wanted[:step]
            logits = self.logits([prefix])[0]
            choice = self._choice(row, prefix, logits, new[step], wanted[step])
            choice.gap = abs(choice.gap)
            found.append(choice)
        return found

    def _choice(
        self, row: int, prefix: list[int], logits: np.ndarray, chosen: int, wanted: int
    ) -> Choice:
        step = len(prefix) - len(self.prompts[row])
        gap = float(logits[wanted] - logits[chosen])
        size = np.abs(logits[np.isfinite(logits)]).max(initial=1.0)
        allowed = self.tolerance * float(size)
        return Choice(row, step, prefix, chosen, wanted, gap, allowed)

    # === With a cache ===

    def compile(self, sampler: Any) -> None:
        """Sets the sampler. The same name again leaves what is compiled alone."""
        if not isinstance(sampler, str) or sampler != self._sampler:
            self._sampler = sampler
            self.doing = f"compiled with the sampler {_name(sampler)}"
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

        Args:
            choices: what was chosen, by row and step.
            claim: str. The claim that is checked.
            advice: str, or a function that takes the wrong choices and returns one:
                what to look at.
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


def _name(sampler: Any) -> str:
    return repr(sampler) if isinstance(sampler, str) else type(sampler).__name__
