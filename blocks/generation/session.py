"""A conversation with a model, of which each turn processes only new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import numpy as np
from keras import ops

from attention.contract import (
    all_layers,
    check_optional_positive_int,
    check_positive_int,
    describe,
    find_not_rewindable,
)
from blocks.generation.compilation import same_objects
from blocks.generation.endings import Endings, resolve_stops
from blocks.generation.options import (
    GenerationOptions,
    Options,
    check_no_logprobs,
    read_options,
)
from blocks.generation.outputs import completions, joined, stream_pieces
from blocks.generation.prompts import (
    NO_TOKENS,
    check_tokens,
    common_length,
    cut_rows,
    pad_rows,
    read_batches,
    row_limits,
    vocabulary_size,
)
from blocks.generation.running_batch import Block, RunningBatch
from blocks.generation.samplers import check_sampler
from blocks.generation.sources import Sources, extended, same_beside
from blocks.generation.speculation import check_speculation
from blocks.generation.verification import speculate


class Session:
    """A sequence that is continued turn by turn, made by `CausalLM.start`.

    Its KV cache is kept between turns, so that a turn processes only the tokens added
    since the last one. It generates the same as `generate` with all of the session's
    tokens as a prompt.

    A session ends with the weights that it began with: after `fit`, `train_on_batch`,
    `set_weights` or loading weights (of the model or its backbone), after LoRA, quantizing
    and another dtype, a turn raises an error. It does not look at the values: whoever
    assigns to single variables starts a new session.

    With several prompts, each is a row with turns of its own: texts are then
    lists with one for each row.

    Attributes:
        tokens: list of `int32` arrays: all tokens of each row.
        num_prefilled: int. How many tokens were processed as prompts so far, in
            all rows.

    Example:

    >>> import numpy as np
    >>> from blocks import CausalLM, CustomBackbone
    >>> backbone = CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=64)
    >>> lm = CausalLM(backbone)
    >>> lm.compile(sampler="greedy")
    >>> session = lm.start({"token_ids": np.arange(1, 9), "padding_mask": np.ones(8)})
    >>> session.num_prefilled
    8
    >>> new = session.generate(max_new_tokens=4, stop_token_ids=None)
    >>> other = session.fork()
    >>> more = {"token_ids": np.array([3, 4]), "padding_mask": np.ones(2)}
    >>> _ = session.generate(more, max_new_tokens=4, stop_token_ids=None)
    >>> session.num_prefilled  # the last new token, and two more
    11
    >>> len(session.tokens[0]), len(other.tokens[0])
    (18, 12)
    """

    def __init__(self, task: Any, engine: Any, prompts: Any, is_single: bool) -> None:
        self._task = task
        self._engine = engine
        self._is_single = is_single
        self._as_text = prompts.as_text
        self.tokens = prompts.rows()
        self._batch = RunningBatch(engine, len(self.tokens), prompts.sources)
        # Whether sources are beside the tokens, and not an encoder's.
        self._are_beside = engine.encoder is None
        # The number of the turn: an iterator of an earlier turn must not go on.
        self._turn = 0
        self._model = _model_version(task)
        self.num_prefilled = self._batch.process(self.tokens)

    def generate(
        self,
        inputs: Any = None,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        max_new_tokens: int | None = None,
        speculation: Any = None,
        **options: Unpack[GenerationOptions],
    ) -> Any:
        """Adds text, if any, and continues.

        Args:
            inputs: the text or tokens to add first: `None`, a string (a list of strings for
                several rows), or a dict of `token_ids` and `padding_mask` (and embeddings,
                see `blocks.EmbeddingInputs`). No start token is put before it.
            max_length: int or `None`. The length of a whole row, all turns
                together, at which it ends.
            stop_token_ids: as for `CausalLM.generate`.
            max_new_tokens: int or `None`. How many tokens each row may get in
                this turn.
            speculation: as for `CausalLM.generate`.
            **options: see `blocks.GenerationOptions`. What they say of prompts is true
                of all tokens before this turn's new ones. Tokens of a stop string are
                among the session's, and not in what is returned.

        Returns:
            The new text: a string, or a list of strings for several rows; the
            new tokens, as arrays, where the session began with tokens. With
            `return_logprobs`, `blocks.Completion`s of these.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if the model's weights have changed since the session
                began, or a row would be too long. The session stays as it was.
        """
        turn = inputs, max_length, stop_token_ids, max_new_tokens, speculation
        found, endings, how = self._begin(*turn, **options)
        prompts = self.tokens
        lengths = [len(row) for row in prompts]
        blocks = list(found)
        count = len(lengths)
        texts: list[Any] = [[""] * count if self._as_text else [NO_TOKENS] * count]
        texts += stream_pieces(blocks, prompts, self._preprocessor, False, endings)
        join: Any = "".join if self._as_text else np.concatenate
        rows = [join(pieces) for pieces in zip(*texts)]
        if how.top is not None:
            whole = joined(blocks, count)
            given = rows if self._as_text else None
            rows = completions(whole, lengths, endings, given)
        return rows[0] if self._is_single else rows

    def stream(
        self,
        inputs: Any = None,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        max_new_tokens: int | None = None,
        speculation: Any = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Any]:
        """Yields pieces of what `generate` returns, as they are generated.

        The arguments are those of `generate`. A session that is continued before all
        pieces were taken goes on after the last one taken, and the iterator of the
        earlier turn raises an error.

        Yields:
            Strings, or arrays of tokens, that joined are the result of `generate`.

        Raises:
            TypeError: as `generate`, at once.
            ValueError: as `generate`, at once; and by the iterator of an earlier
                turn. Whether the model has changed is checked when the turn begins.
        """
        check_no_logprobs(options)
        turn = inputs, max_length, stop_token_ids, max_new_tokens, speculation
        blocks, endings, _ = self._begin(*turn, **options)
        how = self._preprocessor, self._is_single, endings
        return stream_pieces(blocks, self.tokens, *how)

    @property
    def _preprocessor(self) -> Any:
        """Returns what makes text of tokens, or `None` in a session of tokens."""
        return self._task.preprocessor if self._as_text else None

    def _begin(
        self,
        inputs: Any,
        max_length: int | None,
        stop_token_ids: Any,
        max_new_tokens: int | None,
        speculation: Any,
        **given: Any,
    ) -> tuple[Iterator[Block], Endings, Options]:
        """Adds inputs and processes them; returns the blocks of the turn, to be made."""
        task = self._task
        sampler = check_sampler(task, "a session")
        check_speculation(speculation, task)
        options = read_options(given, task, sampler, len(self.tokens))
        stops = resolve_stops(stop_token_ids, task)
        rows, beside = self._read(inputs)
        tokens = [np.concatenate(x) for x in zip(self.tokens, rows)]
        endings = Endings(stops, options.stop, task.preprocessor, tokens)
        room = self._room(tokens, max_length, max_new_tokens)
        self._check_model()
        self._turn += 1
        if self._are_beside:
            lengths = [len(row) for row in self.tokens]
            self._batch.sources = extended(self._batch.sources, lengths, beside)
        self.num_prefilled += self._batch.process(tokens, int(room.max()))
        self.tokens = tokens
        blocks = self._blocks(self._turn, room, endings, options, speculation)
        return blocks, endings, options

    def _blocks(
        self,
        turn: int,
        room: np.ndarray,
        endings: Endings,
        options: Options,
        speculation: Any,
    ) -> Iterator[Block]:
        self._check_turn(turn)
        how = self.tokens, room, endings, options
        if speculation is None:
            blocks = self._batch.decode(*how, block_steps=1)
        else:
            blocks = speculate(self._batch, speculation, *how)
        for block in blocks:
            self.tokens = [
                np.append(*pair).astype("int32")
                for pair in zip(self.tokens, block.rows())
            ]
            yield block
            self._check_turn(turn)

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise ValueError(
                "The session was continued or trimmed since this stream began, so it "
                "can't go on. Take its pieces before the next turn, or stream from a "
                "`fork`."
            )

    def fork(self) -> Session:
        """Returns a session in the same state; neither affects the other."""
        self._check_model()
        other = Session.__new__(Session)
        other.__dict__.update(self.__dict__)
        other._batch = self._batch.copy()
        other.tokens = list(self.tokens)
        return other

    def trim(self, num_tokens: int) -> None:
        """Takes back the last tokens of each row.

        Args:
            num_tokens: int. How many tokens to drop.

        Raises:
            TypeError: if it is not an integer.
            ValueError: if a row has no more tokens than that, or a layer can't
                go back: one with a recurrent state, or with a window that has dropped
                tokens it would need. The session stays as it was.
        """
        num_tokens = check_positive_int("num_tokens", num_tokens)
        lengths = np.array([len(row) for row in self.tokens], "int32") - num_tokens
        if lengths.min() < 1:
            raise ValueError(
                f"`trim` must leave at least one token of each row. Received: "
                f"num_tokens={num_tokens}, and the shortest row has "
                f"{int(lengths.min()) + num_tokens} tokens"
            )
        rows = [row[:n] for row, n in zip(self.tokens, lengths)]
        self._rewind(rows, extended(self._batch.sources, lengths.tolist()))

    def rewrite(self, inputs: Any) -> None:
        """Makes the tokens of the session those of other inputs.

        Only what comes after the tokens that both begin with is processed, by the next
        turn. It is for chat templates, which write the whole conversation anew for each
        turn: `session.rewrite(lm.apply_chat_template(messages))`, then
        `session.generate()`.

        Args:
            inputs: as for `CausalLM.start`, of as many rows.

        Raises:
            TypeError: if `inputs` has the wrong type.
            ValueError: as `trim`, if tokens of the session must be taken back; or if
                `inputs` has another number of rows. The session stays as it was.
        """
        (prompts,), _ = self._task._read(
            inputs, None, 1, one_for="rewrite", has_sources=self._are_beside
        )
        rows = prompts.rows()
        if len(rows) != len(self.tokens):
            raise ValueError(
                f"The session has {len(self.tokens)} rows, so `inputs` must have as "
                f"many. Received: inputs={describe(inputs)}"
            )
        self._rewind(rows, prompts.sources)

    def _rewind(self, rows: list[np.ndarray], sources: Sources | None) -> None:
        """Replaces the tokens, and what is beside them; what both begin with stays."""
        common = np.array(list(map(common_length, self.tokens, rows)), "int32")
        if self._are_beside:
            old = self._batch.sources
            both = (same_beside(old, sources, *x) for x in enumerate(common.tolist()))
            common = np.array(list(both), "int32")
        # The last token is processed again, as its logits are needed.
        last = np.array([len(row) - 1 for row in rows], "int32")
        batch = self._batch
        processed = np.minimum(batch.processed, np.minimum(common, last))
        moves = set(zip(batch.processed.tolist(), processed.tolist()))
        # Without a cache all tokens are processed again anyway.
        for before, after in () if batch.cache is None else moves:
            layer = find_not_rewindable(self._engine.sites, batch.cache, before, after)
            if layer is not None:
                raise ValueError(
                    f"Layer '{layer.name}' ({type(layer).__name__}) can't go back "
                    f"from position {before} to {after}: its cache holds a state "
                    "that can't be undone, or has dropped what it would need. "
                    "Start a new session, or `fork` one before the tokens that "
                    "you may want to take back."
                )
        self._turn += 1
        self.tokens = rows
        batch.processed = processed
        if self._are_beside:
            batch.sources = sources

    def _read(self, inputs: Any) -> tuple[list[np.ndarray], Sources | None]:
        """Returns the tokens to add to each row, and what is beside them."""
        if inputs is None:
            return [NO_TOKENS] * len(self.tokens), None
        split = self._task.split_inputs if self._are_beside else None
        batch, *others = read_batches(inputs, split)[0]
        if others or (batch.texts is not None) != self._as_text:
            raise ValueError(
                "A session that began with "
                f"{'text' if self._as_text else 'tokens'} takes more of the same. "
                f"Received: inputs={describe(inputs)}"
            )
        if batch.texts is not None:
            tokenizer = self._task.preprocessor.tokenizer
            rows = [ops.convert_to_numpy(tokenizer(x)) for x in batch.texts]
            rows = [row.reshape(-1) for row in rows]
        else:
            rows = cut_rows(batch.token_ids, batch.lengths)
        if len(rows) != len(self.tokens):
            raise ValueError(
                f"The session has {len(self.tokens)} rows, so `inputs` must have as "
                f"many. Received: inputs={describe(inputs)}"
            )
        check_tokens(pad_rows(rows)[0], vocabulary_size(self._task))
        return [row.astype("int32") for row in rows], batch.sources

    def _room(
        self,
        tokens: list[np.ndarray],
        max_length: int | None,
        max_new_tokens: int | None,
    ) -> np.ndarray:
        """Returns how many tokens each row may get."""
        check_optional_positive_int("max_length", max_length)
        check_optional_positive_int("max_new_tokens", max_new_tokens)
        lengths = np.array([len(row) for row in tokens], "int32")
        default = self._task.preprocessor.sequence_length if self._as_text else 0
        if not (max_new_tokens or max_length or default):
            raise ValueError(
                "How far to go on? Pass `max_new_tokens`, or `max_length` for "
                "the length of all turns together."
            )
        limit = self._engine.max_positions
        room = row_limits(lengths, max_length, max_new_tokens, default, limit) - lengths
        if room.min() < 0:
            raise ValueError(
                f"A row of the session has {lengths.max()} tokens with what is added, "
                f"which is more than the length of {max_length or default} it may have. "
                "Pass a larger `max_length`, or `trim` the session."
            )
        return room

    def _check_model(self) -> None:
        numbers, weights = _model_version(self._task)
        if numbers != self._model[0] or not same_objects(weights, self._model[1]):
            raise ValueError(
                "The model's weights have changed since the session began, so its KV "
                "cache is no longer that of the model. Start a new one: "
                "`lm.start(...)`. Its tokens are in `session.tokens`."
            )


def _model_version(task: Any) -> tuple[Any, list[Any]]:
    """Returns numbers and weights that are others once a model has changed."""
    owners = (task, task.backbone)
    versions = [getattr(owner, "weights_version", 0) for owner in owners]
    policies = [layer.dtype_policy.name for layer in all_layers(task)]
    return (versions, policies), list(task.weights)
