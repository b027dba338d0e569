"""Packs rows of tokens, each with one start token."""

from __future__ import annotations

from typing import Any

import keras_hub
import numpy as np
import tensorflow as tf


class StartPacker(keras_hub.layers.StartEndPacker):
    """KerasHub's packer; a row that begins with the start token gets no second one.

    Its start value is one token or `None`.
    """

    def call(self, inputs: Any, **kwargs: Any) -> Any:
        """Returns what KerasHub's packer returns."""
        if self.start_value is not None:
            eager = tf.executing_eagerly()
            without = _without_start if eager else _without_start_in_graph
            inputs = without(inputs, self.start_value[0])
        return super().call(inputs, **kwargs)

    def pack_answers(
        self, prompts: Any, responses: Any, length: int, start: bool, end: bool
    ) -> tuple[Any, Any, Any]:
        """Packs rows of prompts, each with its response, of which the end may be cut.

        Returns:
            The tokens, the padding mask, and a mask of what belongs to a response; all
            of shape `(batch, length)`.
        """
        if tf.executing_eagerly():
            both = [[*map(int, (*p, *r))] for p, r in zip(prompts, responses)]
        else:
            both = tf.concat([prompts, responses], axis=1)
        options = {"sequence_length": length, "add_start_value": start}
        tokens, mask = self(both, add_end_value=end, **options)
        _, of_prompt = self(prompts, add_end_value=False, **options)
        return tokens, mask, mask & ~of_prompt


def _without_start(rows: Any, start: int) -> Any:
    if len(rows) and np.ndim(rows[0]) > 0:
        return [_without_start(row, start) for row in rows]
    begins = len(rows) > 0 and int(rows[0]) == start
    return rows[1:] if begins else rows


def _without_start_in_graph(rows: Any, start: int) -> Any:
    if rows.shape.rank == 1:
        return _without_start_in_graph(rows[None], start)[0]
    if not isinstance(rows, tf.RaggedTensor):
        rows = tf.RaggedTensor.from_tensor(rows)
    values, starts = rows.values, rows.row_starts()
    # An empty row at the end starts after the last value.
    begins = tf.gather(tf.pad(values, [[0, 1]]), starts) == start
    begins &= rows.row_lengths() > 0
    kept = tf.ragged.range(starts + tf.cast(begins, starts.dtype), rows.row_limits())
    return kept.with_values(tf.gather(values, kept.values))
