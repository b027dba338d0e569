"""How one call of generation chooses tokens: processors, a sampler, log-probabilities."""

from __future__ import annotations

import copy
import json
import numbers
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np
from keras import ops

from attention.contract import Tensor
from blocks.generation.drawing import draw, filter_logits, uniform
from blocks.generation.options import NO_OPTIONS, Options
from blocks.generation.processors import HostProcessor, TokensSoFar
from blocks.generation.prompts import pad_rows, tokenizer_size
from blocks.generation.samplers import NUMBERS

_samplers = keras_hub.samplers


class Logprobs(NamedTuple):
    """Log-probabilities of tokens, before processors and temperature.

    Attributes:
        chosen: `float32`, `(rows,)` or `(rows, length)`: of the tokens themselves.
        best: `float32`, with an axis more: of the likeliest tokens, the best first; `()` if
            none were asked for.
        best_ids: `int32`, of the same shape: which tokens these are.
    """

    chosen: Tensor
    best: Tensor
    best_ids: Tensor


class Memory(NamedTuple):
    """What processors see and keep: a part of the loop's state."""

    token_ids: Tensor
    prompt_lengths: Tensor
    states: tuple


# Where there are no processors.
NO_MEMORY: Any = ()


class Sampling:
    """How tokens are chosen in one generation, as it was when the generation began.

    Attributes:
        sampler: the `keras_hub.samplers.Sampler`.
        known: int or `None`. How many of the model's first tokens the tokenizer has, if
            it lacks some. Others are never chosen.
        settings: a dict of the numbers that a compiled step takes as arguments: the
            options of each row, or those of the sampler by its attributes (none on torch,
            where nothing is compiled).
        variables: the sampler's variables that choosing reads and assigns.
        contract: tuple. What is fixed in a compiled step.
    """

    def __init__(self, sampler: Any, task: Any, options: Options = NO_OPTIONS) -> None:
        self.sampler = sampler
        known = tokenizer_size(task.preprocessor)
        self.known = known if known and known < task.output.shape[-1] else None
        self.processors = options.processors
        self.top = options.top
        self.draws = bool(options.numbers)
        is_torch = keras.config.backend() == "torch"
        # A step that is not compiled reads the sampler itself.
        eager = is_torch or task.run_eagerly
        self.variables = [] if self.draws else sampler.variables
        if self.draws:
            self.settings: dict[str, Any] = options.numbers
            kind: Any = "options"
        else:
            names = () if is_torch else NUMBERS.get(type(sampler), ())
            numbers_of = {name: getattr(sampler, name, None) for name in names}
            self.settings = {
                name: np.float32(value)
                for name, value in numbers_of.items()
                if isinstance(value, numbers.Real)
            }
            kind = sampler if eager else self._config(task)
        fixed = tuple(x.fixed() for x in self.processors)
        self.contract = (self.known, kind, fixed, self.top)

    def _config(self, task: Any) -> tuple:
        """Returns the class and `get_config()`, without the numbers that are arguments.

        Variables are read at each call. A user's class without a `get_config` of its own
        may hold more: then each `compile` counts as a change.
        """
        kind, config = type(self.sampler), self.sampler.get_config()
        if kind in NUMBERS:
            # The seed is in a variable.
            arguments = {*self.settings, "seed"}
            config = {key: x for key, x in config.items() if key not in arguments}
        variables = [(tuple(v.shape), str(v.dtype)) for v in self.sampler.variables]
        is_keras_hubs = getattr(_samplers, kind.__name__, None) is kind
        is_told = is_keras_hubs or "get_config" in vars(kind)
        silent = None if is_told else (id(self.sampler), task.times_compiled)
        saved = json.dumps(keras.saving.serialize_keras_object(config), sort_keys=True)
        return kind, saved, variables, silent

    def begin(self, rows: list[np.ndarray], capacity: int) -> Any:
        """Returns the memory of the processors before the first new token.

        Args:
            rows: the tokens of each row so far.
            capacity: int. The size of the KV cache.
        """
        if not self.processors:
            return NO_MEMORY
        # The last token is not in the cache.
        token_ids, lengths = pad_rows(rows, capacity + 1)
        tokens = TokensSoFar(token_ids, lengths, lengths)
        states = tuple(x.create_state(tokens) for x in self.processors)
        return Memory(token_ids, lengths, states)

    @property
    def hosted(self) -> dict[int, HostProcessor]:
        """Returns the processors that have their state from the host, by their place."""
        pairs = enumerate(self.processors)
        return {i: x for i, x in pairs if isinstance(x, HostProcessor)}

    def take(self, new: list[np.ndarray]) -> np.ndarray:
        """Tells these the new tokens of rows; returns which rows end with them."""
        ended = [x.take(new) for x in self.hosted.values()]
        return np.logical_or.reduce([np.zeros((len(new),), "bool"), *ended])

    def next_states(self) -> dict[str, Any]:
        """Returns the states that these make for the next token, for `with_hosted`."""
        return {str(i): x.next_state() for i, x in self.hosted.items()}

    def look_ahead(
        self, guesses: list[np.ndarray], width: int
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Returns the states that these make for guesses, and how many guesses count.

        See `HostProcessor.look_ahead`.
        """
        states, counts = {}, np.array(list(map(len, guesses)), "int32")
        for i, processor in self.hosted.items():
            states[str(i)], most = processor.look_ahead(guesses, width)
            counts = np.minimum(counts, most)
        return states, counts

    @staticmethod
    def with_hosted(memory: Any, hosted: dict[str, Any]) -> Any:
        """Returns the memory with states that were made on the host."""
        if not hosted:
            return memory
        pairs = enumerate(memory.states)
        states = tuple(hosted.get(str(i), state) for i, state in pairs)
        return Memory(memory.token_ids, memory.prompt_lengths, states)

    def grown(self, memory: Any, capacity: int) -> Any:
        """Returns the memory for a larger KV cache."""
        if not self.processors or memory.token_ids.shape[1] > capacity:
            return memory
        more = capacity + 1 - memory.token_ids.shape[1]
        token_ids = ops.pad(memory.token_ids, ((0, 0), (0, more)))
        return Memory(token_ids, *memory[1:])

    def choose(
        self,
        logits: Tensor,
        lengths: Tensor,
        settings: dict[str, Tensor],
        memory: Any = NO_MEMORY,
    ) -> tuple[Tensor, Any, Any]:
        """Chooses a token for each row.

        Args:
            logits: tensor `(rows, vocabulary_size)`.
            lengths: `int32` tensor `(rows,)`, or a scalar: how many tokens the rows have.
            settings: as the attribute.
            memory: from `begin`, or from the last call.

        Returns:
            `(token, logprobs, memory)`. The token, `(rows,)`, is -1 where the logits are
            NaN or infinite. The `Logprobs` are `()` unless they were asked for.
        """
        rows = logits.shape[0]
        lengths = ops.broadcast_to(lengths, (rows,))
        raw = logits
        if self.processors:
            logits, states = ops.cast(logits, "float32"), []
            tokens = TokensSoFar(memory.token_ids, lengths, memory.prompt_lengths)
            for processor, state in zip(self.processors, memory.states):
                logits, state = processor.call(logits, tokens, state)
                states.append(state)
        logits = self.mask_unknown(logits)
        choose = self._draw if self.draws else self._sample
        token, broken = choose(logits, lengths, settings)
        logprobs: Any = ()
        if self.top is not None:
            logprobs = logprobs_of(raw, token, self.top)
        if self.processors:
            width = memory.token_ids.shape[1]
            here = ops.arange(width, dtype="int32")[None] == lengths[:, None]
            token_ids = ops.where(here, token[:, None], memory.token_ids)
            memory = Memory(token_ids, memory.prompt_lengths, tuple(states))
        return ops.where(broken, -1, token), logprobs, memory

    def _sample(
        self, logits: Tensor, lengths: Tensor, settings: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Chooses by the sampler that the model was compiled with."""
        # A copy for a trace, as other threads may use the sampler.
        sampler = copy.copy(self.sampler) if settings else self.sampler
        for name, value in settings.items():
            setattr(sampler, name, value)
        probabilities = sampler.compute_probabilities(logits)
        # A single logit that is NaN or infinite makes all probabilities of its row NaN.
        broken = ops.isnan(probabilities[:, 0])
        probabilities = ops.where(broken[:, None], 1.0, probabilities)
        return ops.cast(sampler.get_next_token(probabilities), "int32"), broken

    def _draw(
        self, logits: Tensor, lengths: Tensor, settings: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Chooses by the options of each row."""
        logits = ops.cast(logits, "float32")
        broken = ops.isnan(ops.softmax(logits, axis=-1)[:, 0])
        logits = ops.where(broken[:, None], 0.0, logits)
        greedy = ops.cast(ops.argmax(logits, axis=-1), "int32")
        temperature = settings["temperature"]
        is_greedy = temperature == 0
        # The largest logit is 0, so that none overflows.
        logits = logits - ops.max(logits, axis=-1, keepdims=True)
        logits = logits / ops.where(is_greedy, 1.0, temperature)[:, None]
        filters = [settings[name] for name in ("top_k", "top_p", "min_p")]
        logits = filter_logits(logits, *filters)
        drawn = draw(logits, uniform(settings["seed"], lengths))
        return ops.where(is_greedy, greedy, drawn), broken

    def mask_unknown(self, logits: Tensor) -> Tensor:
        """Returns logits with -inf for tokens that the tokenizer does not have."""
        if self.known is None:
            return logits
        allowed = ops.arange(logits.shape[-1]) < self.known
        return ops.where(allowed[None], logits, float("-inf"))


def logprobs_of(logits: Tensor, token_ids: Tensor, top: int) -> Logprobs:
    """Returns the log-probabilities of tokens, and of the `top` likeliest.

    `logits` have one axis more than `token_ids`, of the vocabulary.
    """
    logprobs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    chosen = ops.take_along_axis(logprobs, token_ids[..., None], axis=-1)[..., 0]
    if not top:
        return Logprobs(chosen, (), ())
    best, best_ids = ops.top_k(logprobs, top)
    return Logprobs(chosen, best, ops.cast(best_ids, "int32"))


def zero_logprobs(rows: int, length: int, top: int) -> Logprobs:
    """Returns zeros in the shapes of the `Logprobs` of rows of so many tokens."""
    chosen, shape = ops.zeros((rows, length)), (rows, length, top)
    if not top:
        return Logprobs(chosen, (), ())
    return Logprobs(chosen, ops.zeros(shape), ops.zeros(shape, dtype="int32"))
