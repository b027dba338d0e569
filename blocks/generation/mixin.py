"""The methods `generate`, `stream` and `start` of a causal language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from attention.contract import check_positive_int
from blocks.generation.progress import check_verbose, with_progress
from blocks.generation.prompts import Prompts, resolve_stops
from blocks.generation.running_batch import Block, RunningBatch
from blocks.generation.samplers import check_sampler, has_own_loop
from blocks.generation.search import search
from blocks.generation.session import Session
from blocks.generation.speculation import Speculation, check_speculation, speculate
from blocks.generation.steps import GenerationSteps
from blocks.generation.streaming import detokenize, stream_pieces
from blocks.generation.token_rows import (
    NO_TOKENS,
    join_outputs,
    pad_token_id,
    to_arrays,
)


class GenerationMixin(GenerationSteps):
    """Generation for `blocks.CausalLM`, which it is a part of."""

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        max_new_tokens: int | None = None,
        num_return_sequences: int = 1,
        speculation: Speculation | None = None,
        verbose: str | int = "auto",
    ) -> Any:
        """Continues prompts.

        Prompts of different lengths in one batch give the same outputs as each alone.
        Tokens of the model that the preprocessor's tokenizer lacks are never chosen.

        Args:
            inputs: text (a string; strings in a list, an array, a pandas Series or a
                generator), token ids (integers of shape `(batch, length)`, or
                `(length,)` for one prompt: an array, lists, a `tf.RaggedTensor`; alone,
                or in a dict of `token_ids` and `padding_mask`, padded on the right), or
                a `tf.data.Dataset` of batches of either.
            max_length: int or `None`. The length of prompt and new tokens
                together, at which rows end. The default is the preprocessor's
                `sequence_length` for text, the arrays' length for tokens with a
                `padding_mask`, and what `max_new_tokens` asks for where that is given.
            stop_token_ids: the tokens at which a row ends: an id or several, `None`, or
                `"auto"` for the preprocessor's end token.
            strip_prompt: bool. Whether to return the new tokens only.
            max_new_tokens: int or `None`. How many tokens each row may get,
                whatever the length of its prompt.
            num_return_sequences: int. How many continuations to sample for each
                prompt, which is read once for all of them.
            speculation: `None`, `blocks.PromptLookup()` or
                `blocks.DraftModel(model)`: guesses tokens for the model to
                verify several at once. Outputs are distributed as without.
            verbose: `"auto"`, 0 or 1. Whether to show a progress bar; `"auto"`
                shows one for several batches that take more than two seconds,
                in a terminal or a notebook.

        Returns:
            For a string a string, for strings a list of strings, for tokens a
            dict of `token_ids` and `padding_mask` as NumPy arrays. With
            `num_return_sequences`, a list of strings for each string; arrays
            have an axis for them after the batch axis.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if a prompt is empty or longer than allowed, holds
                tokens outside of the vocabulary, or is not padded on the right; if no
                prompt has room for a new token and neither length was passed; and if
                the model's logits are NaN or infinite.

        Example:

        >>> import numpy as np
        >>> from blocks import CausalLM, CustomBackbone
        >>> backbone = CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32)
        >>> lm = CausalLM(backbone)
        >>> lm.compile(sampler="greedy")
        >>> prompts = {
        ...     "token_ids": np.array([[1, 2, 3, 4], [5, 6, 0, 0]]),
        ...     "padding_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
        ... }
        >>> out = lm.generate(prompts, stop_token_ids=None, max_new_tokens=3)
        >>> out["padding_mask"].sum(axis=1).tolist()
        [7, 5]
        """
        stops = resolve_stops(stop_token_ids, self)
        times = check_positive_int("num_return_sequences", num_return_sequences)
        purpose = None if times == 1 else "`num_return_sequences`"
        purpose = purpose if speculation is None else "`speculation`"
        check_sampler(self._sampler(), self.output.shape[-1], purpose)
        check_speculation(speculation, self)
        check_verbose(verbose)
        # All prompts are checked before the first is continued, so that no work is lost
        # to an error in the last.
        prompts, is_single = self._read(inputs, max_length, max_new_tokens)
        outputs = []
        for batch in with_progress(
            prompts, verbose, self.generation_sizes.progress_seconds
        ):
            new = self._new_tokens(batch, stops, times, speculation)
            outputs.append(self._to_outputs(batch.repeat(times), new, strip_prompt))
        pad = pad_token_id(self.preprocessor)
        return join_outputs(outputs, is_single, pad, times)

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        max_new_tokens: int | None = None,
        speculation: Speculation | None = None,
    ) -> Iterator[Any]:
        """Continues prompts, and yields text as it is generated.

        The arguments are those of `generate`, and the pieces joined are its result: the
        first is the prompt, unless `strip_prompt`. No piece ends within a character.

        Args:
            inputs: as for `generate`, one batch.
            max_length: as for `generate`.
            stop_token_ids: as for `generate`.
            strip_prompt: bool. Whether to leave out the prompt.
            max_new_tokens: as for `generate`.
            speculation: as for `generate`.

        Yields:
            For one string, strings. For a list of strings, lists with a string
            for each, empty where there is nothing new. For one row of tokens, arrays
            of tokens; for several, lists of such.

        Raises:
            TypeError: as `generate`; when called, not at the first piece.
            ValueError: as `generate`; when called, not at the first piece, but for
                logits that are NaN or infinite.

        Example:

        >>> import keras_hub
        >>> from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone
        >>> tokenizer = keras_hub.tokenizers.ByteTokenizer()
        >>> backbone = CustomBackbone(256, 1, 2, 16, 32, max_sequence_length=32)
        >>> lm = CausalLM(backbone, CausalLMPreprocessor(tokenizer, 16))
        >>> lm.compile(sampler="greedy")
        >>> "".join(lm.stream("once upon")) == lm.generate("once upon")
        True
        """
        stops = resolve_stops(stop_token_ids, self)
        check_sampler(self._sampler(), self.output.shape[-1], "`stream`")
        check_speculation(speculation, self)
        prompts, is_single = self._read_one(
            "stream", inputs, max_length, max_new_tokens
        )
        return stream_pieces(
            self._blocks(prompts, stops, 1, speculation, block_steps=1),
            len(prompts.lengths),
            None if strip_prompt else prompts.rows(),
            self.preprocessor if prompts.as_text else None,
            is_single,
        )

    def start(self, inputs: Any) -> Session:
        """Starts a session, which is continued turn by turn.

        Args:
            inputs: as for `generate`, one batch. It is processed at once.

        Returns:
            A `blocks.Session`.

        Raises:
            TypeError: if `inputs` has the wrong type.
            ValueError: if a prompt is empty or holds tokens outside of the
                vocabulary.
        """
        # A session has no length until it generates.
        prompts, is_single = self._read_one("start", inputs, None, 1)
        return Session(self, self._engine(), prompts, is_single)

    def _sampler(self) -> Any:
        """Returns the sampler, or `None` if the model is not compiled."""
        return getattr(self, "sampler", None)

    def _new_tokens(
        self,
        prompts: Prompts,
        stops: tuple[int, ...],
        times: int,
        speculation: Speculation | None,
    ) -> list[np.ndarray]:
        """Returns the new tokens of each row."""
        if has_own_loop(self._sampler()):
            arrays = (prompts.token_ids, prompts.lengths, prompts.limits)
            return search(self._engine(), self._sampler(), *arrays, stops)
        rows = [[NO_TOKENS] for _ in range(len(prompts.lengths) * times)]
        for tokens, valid in self._blocks(prompts, stops, times, speculation):
            for row, new, mask in zip(rows, tokens, valid):
                row.append(new[mask])
        return [np.concatenate(row) for row in rows]

    def _blocks(
        self,
        prompts: Prompts,
        stops: tuple[int, ...],
        times: int,
        speculation: Speculation | None,
        block_steps: int | None = None,
    ) -> Iterator[Block]:
        room = prompts.limits - prompts.lengths
        if room.max() <= 0:
            return
        batch = RunningBatch(self._engine(), len(room))
        # The last token is not processed.
        batch.process(prompts.rows(), int(room.max()) - 1)
        if times > 1:
            batch.repeat(times)
            room = np.repeat(room, times)
        if speculation is None:
            yield from batch.decode(room, stops, block_steps)
        else:
            rows = prompts.repeat(times).rows()
            yield from speculate(batch, speculation, rows, room, stops)

    def _to_outputs(
        self, prompts: Prompts, new_tokens: list[np.ndarray], strip_prompt: bool
    ) -> Any:
        """Returns strings or arrays, as the user passed."""
        rows = new_tokens
        if not strip_prompt:
            rows = [np.concatenate(pair) for pair in zip(prompts.rows(), new_tokens)]
        if prompts.as_text:
            return detokenize(rows, self.preprocessor)
        return to_arrays(rows, pad_token_id(self.preprocessor), prompts.width)
