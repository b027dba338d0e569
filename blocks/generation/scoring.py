"""The log-likelihood of texts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from attention.contract import check_positive_int
from blocks.generation.options import check_top
from blocks.generation.prompts import cut_rows, pad_rows, read_batches, read_prompts
from blocks.generation.running_batch import BROKEN_LOGITS
from blocks.generation.sampling import Logprobs
from blocks.generation.sources import Sources, rows_of, stacked
from blocks.generation.steps import GenerationSteps


class Score(NamedTuple):
    """The log-probabilities of the tokens of a text.

    Attributes:
        token_ids: `int32` array `(length,)`.
        logprobs: `Logprobs` of the tokens from the second on, as nothing is before the
            first: `chosen`, `(length - 1,)`; `best` and `best_ids`, `(length - 1,
            return_logprobs)`, or `()` for 0.
    """

    token_ids: np.ndarray
    logprobs: Logprobs


class ScoringMixin(GenerationSteps):
    """The method `score` of a causal language model."""

    def score(
        self, inputs: Any, return_logprobs: int | None = None, batch_size: int = 32
    ) -> Any:
        """Computes how likely texts are.

        Each is scored as if alone, whatever the lengths of the others. Logits are in memory
        for a few positions at a time.

        Args:
            inputs: text or tokens, as for `generate`.
            return_logprobs: int or `None`. Returns numbers for each token, and so many of
                the likeliest tokens in its place.
            batch_size: int. How many rows to process at once.

        Returns:
            The sum of the log-probabilities of all tokens but the first of each text, given
            those before: a `float32` array with one for each, or a scalar for a single
            text. With `return_logprobs`, a list of `blocks.Score`, or one.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if a text is empty or has more tokens than one more than the model
                knows positions; or if logits are NaN or infinite.

        Example:

        >>> import numpy as np
        >>> from keras import ops
        >>> from blocks import CausalLM, CustomBackbone
        >>> lm = CausalLM(CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32))
        >>> likelihoods = lm.score([[1, 2, 3], [4, 5]])
        >>> likelihoods.shape
        (2,)
        >>> x = {"token_ids": np.array([[4, 5]]), "padding_mask": np.ones((1, 2))}
        >>> expected = ops.log_softmax(lm(x))[0, 0, 5]
        >>> bool(abs(likelihoods[1] - expected) < 1e-5)
        True
        """
        check_positive_int("batch_size", batch_size)
        top = check_top(return_logprobs, self)
        batches, is_single = read_batches(inputs, self.split_inputs)
        rows = [row for batch in batches for row in self._rows(batch)]
        sources = [x for batch in batches for x in rows_of(batch.sources)]
        found: list[Any] = [None] * len(rows)
        # Rows of about one length are processed together.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(rows), batch_size):
            group = order[start : start + batch_size]
            parts = [rows[i] for i in group], [sources[i] for i in group if sources]
            for i, score in zip(group, self._score(*parts, top or 0)):
                found[i] = score
        if top is not None:
            return found[0] if is_single else found
        sums = np.array([x.logprobs.chosen.sum() for x in found], "float32")
        return sums[0] if is_single else sums

    def _rows(self, batch: Any) -> list[np.ndarray]:
        prompts = read_prompts(batch, self, None, 1, None)
        limit, longest = self._engine().max_positions, int(prompts.lengths.max())
        # A row's last token needs no position.
        if limit is not None and longest > limit + 1:
            raise ValueError(
                f"The model has learned {limit} positions, so it scores up to {limit + 1} "
                f"tokens, and row {int(prompts.lengths.argmax())} has {longest} tokens. "
                "Score it in parts."
            )
        return cut_rows(prompts.token_ids, prompts.lengths)

    def _score(
        self, rows: list[np.ndarray], sources: list[Sources], top: int
    ) -> list[Score]:
        tokens, lengths = pad_rows(rows)
        logprobs = self._engine().score(tokens, lengths, top, stacked(sources))
        logprobs = tree.map_structure(ops.convert_to_numpy, logprobs)
        scores = []
        for i, row in enumerate(rows):
            last = len(row) - 1
            one = tree.map_structure(lambda x: x[i, :last], logprobs)  # noqa: B023
            if np.isnan(one.chosen).any():
                place = int(np.flatnonzero(np.isnan(one.chosen))[0])
                raise ValueError(
                    f"After {place + 1} tokens of a row of {len(row)} the model's logits "
                    f"are NaN or infinite. {BROKEN_LOGITS}"
                )
            scores.append(Score(row.astype("int32"), one))
        return scores
