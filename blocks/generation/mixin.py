"""The methods `generate`, `stream` and `start` of a causal language model."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, Unpack

import keras
import numpy as np

from attention.contract import check_positive_int, describe
from blocks.generation.endings import NO_ENDINGS, Endings, resolve_stops
from blocks.generation.options import (
    GenerationOptions,
    Options,
    check_no_logprobs,
    read_options,
)
from blocks.generation.outputs import completions, joined, stream_pieces
from blocks.generation.prompts import Prompts
from blocks.generation.running_batch import Block, RunningBatch
from blocks.generation.samplers import check_sampler, has_own_loop
from blocks.generation.scoring import ScoringMixin
from blocks.generation.search import search
from blocks.generation.session import Session
from blocks.generation.speculation import Speculation, check_speculation
from blocks.generation.texts import (
    TextPieces,
    detokenize,
    find_stop,
    pad_token_id,
    to_arrays,
)
from blocks.generation.verification import speculate


class GenerationMixin(ScoringMixin):
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
        **options: Unpack[GenerationOptions],
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
            **options: `temperature`, `top_k`, `top_p`, `min_p`, `seed`,
                `repetition_penalty`, `presence_penalty`, `frequency_penalty`,
                `no_repeat_ngram_size`, `logit_bias`, `processors`, `stop` and
                `return_logprobs`: see `blocks.GenerationOptions`.

        Returns:
            For a string a string, for strings a list of strings, for tokens a
            dict of `token_ids` and `padding_mask` as NumPy arrays. With
            `num_return_sequences`, a list of strings for each string; arrays
            have an axis for them after the batch axis. With `return_logprobs`, a
            `blocks.Completion` for each continuation, in such lists.

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
        needed = [name for name, value in options.items() if value is not None]
        purpose = f"`{needed[0]}`" if needed else None
        purpose = purpose if times == 1 else "`num_return_sequences`"
        purpose = purpose if speculation is None else "`speculation`"
        sampler = check_sampler(self, purpose)
        check_speculation(speculation, self)
        if verbose not in ("auto", 0, 1):
            raise ValueError(
                '`verbose` must be "auto", 0 (no progress bar) or 1. Received: '
                f"verbose={describe(verbose)}"
            )
        # All prompts are checked before the first is continued, so that no work is lost
        # to an error in the last.
        prompts, is_single = self._read(inputs, max_length, max_new_tokens)
        chosen = [
            read_options(options, self, sampler, len(batch.lengths), times)
            for batch in prompts
        ]
        outputs: list[Any] = []
        seconds = self.generation_sizes.progress_seconds
        batches = list(zip(prompts, chosen))
        for batch, how in with_progress(batches, verbose, seconds):
            if has_own_loop(sampler):
                rows = search(self._engine(), batch, stops)
                outputs += self._finished(batch, rows, strip_prompt)
                continue
            rows = batch.rows(times)
            endings = Endings(stops, how.stop, self.preprocessor, rows)
            blocks = list(self._blocks(batch, endings, how, times, speculation))
            whole = joined(blocks, len(batch.lengths) * times)
            found = self._finished(batch, whole.rows(), strip_prompt, endings)
            if how.top is not None:
                lengths = np.repeat(batch.lengths, times).tolist()
                texts = found if batch.as_text else None
                found = completions(whole, lengths, endings, texts)
            outputs += found
        shape = (() if is_single else (-1,)) + (() if times == 1 else (times,))
        if prompts[0].as_text or chosen[0].top is not None:
            objects = np.empty((len(outputs),), object)
            objects[:] = outputs
            return objects.reshape(shape).tolist() if shape else outputs[0]
        width = max(batch.width for batch in prompts)
        arrays = to_arrays(outputs, pad_token_id(self.preprocessor), width)
        names = zip(self.target_names, arrays.values())
        return {name: x.reshape(*shape, width) for name, x in names}

    def _finished(
        self,
        prompts: Prompts,
        new: list[np.ndarray],
        strip_prompt: bool,
        endings: Endings = NO_ENDINGS,
    ) -> list[Any]:
        """Returns the text or the tokens of rows, which end before a stop string."""
        times = len(new) // len(prompts.lengths)
        befores = prompts.rows(times)
        if not prompts.as_text:
            new = [endings.cut(*pair) for pair in enumerate(new)]
            if strip_prompt:
                return new
            return [np.concatenate(pair) for pair in zip(befores, new)]
        new = [row[: endings.seen.get(i)] for i, row in enumerate(new)]
        if strip_prompt:
            pieces = TextPieces(len(new), self.preprocessor, endings.stop, befores)
            return pieces.add(new, finished=True)
        rows = [np.concatenate(pair) for pair in zip(befores, new)]
        texts = detokenize(rows, self.preprocessor)
        for row in endings.kept:
            start = len(detokenize([befores[row]], self.preprocessor)[0])
            place = find_stop(texts[row], endings.stop[row], start)
            texts[row] = texts[row][:place]
        return texts

    def stream(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
        max_new_tokens: int | None = None,
        speculation: Speculation | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Any]:
        """Continues prompts, and yields text as it is generated.

        The arguments are those of `generate` (`inputs` is one batch), and the pieces
        joined are its result: the first is the prompt, unless `strip_prompt`. No piece
        ends within a character, or has a part of a stop string.

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
        check_no_logprobs(options)
        sampler = check_sampler(self, "`stream`")
        check_speculation(speculation, self)
        (prompts,), is_single = self._read(
            inputs, max_length, max_new_tokens, one_for="stream"
        )
        rows = prompts.rows()
        how = read_options(options, self, sampler, len(rows))
        endings = Endings(stops, how.stop, self.preprocessor, rows)
        blocks = self._blocks(prompts, endings, how, 1, speculation, block_steps=1)
        preprocessor = self.preprocessor if prompts.as_text else None
        return stream_pieces(
            blocks, rows, preprocessor, is_single, endings, strip_prompt
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
        (prompts,), is_single = self._read(inputs, None, 1, one_for="start")
        return Session(self, self._engine(), prompts, is_single)

    def _blocks(
        self,
        prompts: Prompts,
        endings: Endings,
        options: Options,
        times: int,
        speculation: Speculation | None,
        block_steps: int | None = None,
    ) -> Iterator[Block]:
        room = prompts.limits - prompts.lengths
        if room.max() <= 0:
            return
        batch = RunningBatch(self._engine(), len(room), prompts.sources)
        # The last token is not processed.
        batch.process(prompts.rows(), int(room.max()) - 1)
        if times > 1:
            batch.repeat(times)
            room = np.repeat(room, times)
        how = prompts.rows(times), room, endings, options
        if speculation is None:
            yield from batch.decode(*how, block_steps)
        else:
            yield from speculate(batch, speculation, *how)


def with_progress(batches: list[Any], verbose: Any, seconds: float) -> Iterator[Any]:
    """Yields batches, and shows how many are done.

    With `verbose="auto"` that is after so many seconds, for several batches that
    somebody waits for.
    """
    if verbose == "auto":
        verbose = len(batches) > 1 and _is_watched()
    else:
        seconds = 0.0
    bar = keras.utils.Progbar(len(batches), unit_name="batch", verbose=int(verbose))
    begin = time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        if time.monotonic() - begin >= seconds:
            bar.update(done)


def _is_watched() -> bool:
    if sys.stdout is not None and sys.stdout.isatty():
        return True
    # A notebook's output is not a terminal, but is watched, too.
    shell = sys.modules.get("IPython")
    kernel = getattr(shell, "get_ipython", lambda: None)() if shell else None
    return kernel is not None and hasattr(kernel, "kernel")
