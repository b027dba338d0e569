"""The steps of generation, for loops of one's own."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import keras
import numpy as np
from keras import ops, tree

from attention.contract import Cache, Tensor, check_positive_int, describe, is_concrete
from blocks.generation.backbone_inputs import NAMES
from blocks.generation.compilation import CompiledStep, GenerationSizes
from blocks.generation.engine import Engine
from blocks.generation.options import GenerationOptions, Options, draws, read_options
from blocks.generation.prompts import (
    Prompts,
    check_tokens,
    read_batches,
    read_prompts,
    vocabulary_size,
)
from blocks.generation.samplers import check_sampler
from blocks.generation.sampling import NO_MEMORY
from blocks.generation.sources import Sources, encode, with_tokens


class GenerationState(NamedTuple):
    """The state of a generation: all that the next step needs besides weights.

    It is a pytree: it goes through `jax.jit`, `tf.function`, `keras.tree` and loops of
    any backend. `CausalLM.prefill` makes it, and `CausalLM.decode_step` returns the
    next one.

    Attributes:
        cache: a tuple with the cache of each call of a cached layer.
        cache_update_index: `int32` tensor of shape `(batch,)`: how many
            positions of each row the cache holds.
        logits: tensor of shape `(batch, vocabulary_size)`: of the next token.
        max_length: `int32` scalar tensor: how many positions each row can have.
        memory: what the logits processors keep, or `()` if there are none.
    """

    cache: Cache
    cache_update_index: Tensor
    logits: Tensor
    max_length: Tensor
    memory: Any = NO_MEMORY


class GenerationSteps:
    """The engine of `blocks.CausalLM`, and its steps one by one."""

    preprocessor: Any
    output: Any
    generation_sizes: GenerationSizes
    # The names of what is continued, among the inputs.
    target_names = NAMES
    # How many times `compile` was called.
    times_compiled = 0
    # Defaults of each call, and whether they say how tokens are drawn: not where
    # `compile` was given a sampler.
    generation_options: dict[str, Any]
    _draws_by_options = False
    _generation_engine: Engine | None = None
    _generation_jit_compile: Any = "auto"

    def prefill(
        self, inputs: Any, max_length: int, **options: Unpack[GenerationOptions]
    ) -> GenerationState:
        """Reads prompts: the first step of a generation loop of your own.

        Args:
            inputs: as for `generate`.
            max_length: int. How many positions each row can have in all.
            **options: those that `sample` will be called with.

        Returns:
            A `GenerationState`, whose `logits` are those of the first new
            token.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if a prompt is empty or longer than `max_length`, or the
                model does not know so many positions.

        Example:

        >>> import numpy as np
        >>> from keras import ops
        >>> from blocks import CausalLM, CustomBackbone
        >>> backbone = CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32)
        >>> lm = CausalLM(backbone)
        >>> prompt = {"token_ids": np.array([[1, 2, 3]]), "padding_mask": np.ones((1, 3))}
        >>> state = lm.prefill(prompt, max_length=8)
        >>> for _ in range(5):
        ...     tokens = ops.argmax(state.logits, axis=-1)  # or `lm.sample(state)`
        ...     logits, state = lm.decode_step(tokens, state)
        >>> int(state.cache_update_index[0]), tuple(logits.shape)
        (8, (1, 50))
        """
        check_positive_int("max_length", max_length)
        (prompts,), _ = self._read(inputs, max_length, None, one_for="prefill")
        engine = self._engine()
        cache = encode(engine, prompts.sources, max_length)
        logits, cache = engine.process(
            cache,
            max_length,
            with_tokens(prompts.token_ids, prompts.sources, engine),
            np.int32(0),
            prompts.lengths,
        )
        index = ops.convert_to_tensor(prompts.lengths)
        limit = ops.convert_to_tensor(np.int32(max_length))
        memory = NO_MEMORY
        if options or self.generation_options:
            how = self._loop_options(options, len(prompts.lengths))
            sampling = engine.sampling(how)
            memory = sampling.begin(prompts.rows(), max_length)
            memory = tree.map_structure(ops.convert_to_tensor, memory)
        return GenerationState(cache, index, logits, limit, memory)

    def sample(
        self, state: GenerationState, **options: Unpack[GenerationOptions]
    ) -> tuple[Any, GenerationState]:
        """Chooses the next token of each row, in a loop of your own.

        It is what `generate` does between two decode steps. With `temperature` and `seed`
        it may be called inside of `jax.jit` or `tf.function`.

        Args:
            state: from `prefill`, or from the last `decode_step`.
            **options: see `blocks.GenerationOptions`; without any, the sampler that the
                model was compiled with chooses. `prefill` takes the same ones.

        Returns:
            `(tokens, state)`: integers of shape `(batch,)`, -1 where logits are NaN or
            infinite; and the state for `decode_step`.

        Raises:
            TypeError: if an option has the wrong type.
            ValueError: if an option is not allowed, or `prefill` had no such processors.

        Example:

        >>> from blocks import CausalLM, CustomBackbone
        >>> lm = CausalLM(CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32))
        >>> lm.compile(sampler="greedy")
        >>> options = {"temperature": 0.8, "repetition_penalty": 1.2, "seed": 3}
        >>> state = lm.prefill([[1, 2, 3]], max_length=8, **options)
        >>> found = []
        >>> for _ in range(5):
        ...     tokens, state = lm.sample(state, **options)
        ...     _, state = lm.decode_step(tokens, state)
        ...     found.append(int(tokens[0]))
        >>> out = lm.generate([[1, 2, 3]], max_length=8, stop_token_ids=None, **options)
        >>> out["token_ids"][0, 3:].tolist() == found
        True
        """
        how = self._loop_options(options, state.logits.shape[0])
        sampling = self._engine().sampling(how)
        states = state.memory.states if state.memory else ()
        if len(states) != len(sampling.processors):
            raise ValueError(
                f"`sample` was called with {len(sampling.processors)} logits processors "
                f"(penalties and biases are some, too), and `prefill` with {len(states)}. "
                "Pass the same options to both."
            )
        tokens, _, memory = self._engine().sample(
            state.logits, sampling, state.cache_update_index, state.memory
        )
        return tokens, GenerationState(*state[:4], memory)

    def _loop_options(self, options: Any, rows: int) -> Options:
        for name in ("grammar", "stop", "return_logprobs"):
            if options.get(name) is not None:
                raise ValueError(
                    f"`{name}` is an option of `generate`. In a loop of your own, look at "
                    "the tokens and at `state.logits`."
                )
        return read_options(options, self, check_sampler(self, "`sample`"), rows)

    def decode_step(
        self, tokens: Tensor, state: GenerationState, donate: bool = False
    ) -> tuple[Any, GenerationState]:
        """Processes one token of each row: the step of a loop of your own.

        It may be called inside of `jax.jit` or `tf.function`.

        Args:
            tokens: integers of shape `(batch,)`: the token chosen for each row.
            state: from `prefill`, or from the last step.
            donate: bool. Whether the memory of `state` may be reused, as it is not used
                after this call. Without it JAX and torch copy the KV cache.

        Returns:
            `(logits, state)`: the logits of the next token, of shape `(batch,
            vocabulary_size)`, and the state after this step.

        Raises:
            TypeError: if `state` is not a `GenerationState` or `tokens` are not
                integers.
            ValueError: if `tokens` has another shape; and, outside of compiled
                functions, if one is not in the vocabulary or a row is full. Within a
                compiled function the logits of a full row are NaN.
        """
        if not isinstance(state, GenerationState):
            raise TypeError(
                "`state` must come from `prefill` or the last `decode_step`. "
                f"Received: state={describe(state)}"
            )
        cache, index, logits, limit, memory = state
        shape = tuple(getattr(tokens, "shape", np.shape(tokens)))
        rows = logits.shape[0]
        if shape != (rows,):
            raise ValueError(
                f"`tokens` must hold one token for each of the {rows} rows: shape "
                f"({rows},). Received: tokens={describe(tokens)}"
            )
        tokens = ops.convert_to_tensor(tokens)
        if "int" not in keras.backend.standardize_dtype(tokens.dtype):
            raise TypeError(
                f"`tokens` must be integers. Received: tokens={describe(tokens)}"
            )
        tokens = ops.cast(tokens, "int32")
        if is_concrete(tokens):
            check_tokens(ops.convert_to_numpy(tokens)[:, None], vocabulary_size(self))
        capacity = int(ops.convert_to_numpy(limit)) if is_concrete(limit) else None
        if capacity is not None and is_concrete(index):
            reached = int(ops.convert_to_numpy(index).max())
            if reached >= capacity:
                raise ValueError(
                    f"A row has {reached} tokens, and `state` has room for {capacity} "
                    "positions. Call `prefill` with a larger `max_length`."
                )
        logits, cache = self._engine().step(
            cache, capacity, tokens, index, limit, donate
        )
        return logits, GenerationState(cache, index + 1, logits, limit, memory)

    @property
    def compiled_steps(self) -> tuple[CompiledStep, ...]:
        """Returns the steps of generation compiled so far, and the reason for each.

        Look here for the reason of a recompile (retrace), or at the INFO messages of
        `logging.getLogger("blocks.generation")`. Empty on torch, where the operations
        of the model's calls are recorded instead.
        """
        engine = self._generation_engine
        return () if engine is None else tuple(engine.functions.steps)

    @property
    def compilations(self) -> int:
        """Returns how many steps of generation were compiled so far."""
        return len(self.compiled_steps)

    @property
    def xla_generation(self) -> bool:
        """Returns whether generation is compiled by XLA on TensorFlow."""
        return self._generation_jit_compile is not False

    def default_options(self) -> dict[str, Any]:
        """Returns the options of a call that gives none."""
        options = self.generation_options
        if self._draws_by_options:
            return options
        return {name: x for name, x in options.items() if not draws({name: x})}

    def _reset_generation(self, jit_compile: Any) -> None:
        self._generation_jit_compile = jit_compile
        self.times_compiled += 1

    def split_inputs(self, inputs: Any) -> tuple[Sources | None, Any]:
        """Returns the sources among the inputs of `generate`, and the prompts."""
        return None, inputs

    def preprocess_prompts(self, texts: list[str], length: int) -> dict[str, Any]:
        """Returns the `token_ids` and the `padding_mask` of prompts."""
        return self.preprocessor.generate_preprocess(texts, sequence_length=length)

    def _engine(self) -> Engine:
        if self._generation_engine is None:
            self._generation_engine = Engine(self)
        return self._generation_engine

    def _read(
        self,
        inputs: Any,
        max_length: int | None,
        max_new_tokens: int | None,
        one_for: str | None = None,
        has_sources: bool = True,
    ) -> tuple[list[Prompts], bool]:
        """Returns batches of prompts, and whether there is one without a batch axis.

        `one_for` is the name of a method that takes one batch only. In a session inputs
        are prompts alone.
        """
        split = self.split_inputs if has_sources else None
        batches, is_single = read_batches(inputs, split)
        if one_for is not None and len(batches) > 1:
            raise ValueError(
                f"`{one_for}` takes one batch of prompts, not a dataset of them. Call "
                "it for each batch, or call `generate`."
            )
        limit = self._engine().max_positions
        prompts = [
            read_prompts(x, self, max_length, max_new_tokens, limit) for x in batches
        ]
        no_room = all((x.limits <= x.lengths).all() for x in prompts)
        if no_room and max_length is None and max_new_tokens is None:
            raise ValueError(
                "No prompt has room for a new token: pass `max_new_tokens`, or "
                "`max_length` for the length of prompt and new tokens together. "
                f"Received: inputs={describe(inputs)}"
            )
        return prompts, is_single
