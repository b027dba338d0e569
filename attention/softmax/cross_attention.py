"""Attention to another sequence, whose keys and values are computed once."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.caches.cache_policy import to_cache_layout
from attention.contract.arguments import check_positive_int, describe
from attention.contract.checks import check_padding_mask, check_sequence_shape
from attention.contract.padding import zero_padding
from attention.contract.sizes import is_concrete, static_size
from attention.contract.types import Cache, Index, Mask, Shape, Tensor
from attention.positions.arithmetic import token_positions
from attention.softmax.call_arguments import check_attention_mask
from attention.softmax.grouped_query_attention import GroupedQueryAttention
from attention.softmax.visibility import Visibility


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CrossAttention(GroupedQueryAttention):
    """Attention of a decoder to the outputs of an encoder.

    ```
    query ─────────────► query_dense ─────────────────────┐
    value ─► key_dense, value_dense ─► cache (once) ─► softmax(q·k) ─► × ─► output_dense
    ```

    With a cache, a call that is given `value` writes its keys and values, and its
    padding mask, to the cache; a call without reads what was written. All of a
    source is visible to all queries.

    Args:
        num_heads: int. The number of query heads.
        num_key_value_heads: int or `None`, which means `num_heads`.
        **kwargs: as for `GroupedQueryAttention`, without `window` and `position`.

    Call arguments:
        query: tensor of shape `(batch, length, width)`.
        value: tensor of shape `(batch, source_length, source_width)`; `None`, with
            a cache, means what was written there.
        value_padding_mask: `None` or boolean tensor `(batch, source_length)`: the
            real tokens of `value`.
        attention_mask: `None` or boolean tensor `(batch, length, source_length)`.
        padding_mask: boolean tensor `(batch, length)`: the real tokens of `query`.
        cache: a cache made by `create_cache`.
        cache_update_index: how many positions the cache holds. It says only whether
            `value` is the first source of the cache, or must be the same again.
        return_attention_scores: bool. Whether to return the weights, too.
        training: bool. Whether to apply dropout.

    Returns:
        A tensor of the shape of `query`; with `return_attention_scores`, `(outputs,
        scores)`; with a cache, `(what is said above, cache)`.

    Raises:
        ValueError: if there is no source, neither as `value` nor in the cache; or it does
            not fit, or is another than before. (A compiled step, which can raise no
            error, returns NaN where the cache holds no source.)

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> from attention import CrossAttention
    >>> layer = CrossAttention(num_heads=2)
    >>> x, source = np.random.normal(size=(2, 1, 5, 8)).astype("float32")
    >>> full = layer(x, source)
    >>> cache = layer.create_cache(batch_size=1, max_length=9, source_length=5)
    >>> head, cache = layer(x[:, :4], source, cache=cache, cache_update_index=0)
    >>> tail, cache = layer(x[:, 4:], cache=cache, cache_update_index=4)
    >>> bool(ops.all(ops.isclose(tail, full[:, 4:], atol=1e-5)))
    True

    Reference:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    def __init__(
        self, num_heads: int, num_key_value_heads: int | None = None, **kwargs: Any
    ) -> None:
        for name in ("window", "position"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`CrossAttention` takes no `{name}`: positions of two sequences "
                    f"are not comparable. Received: {name}={describe(kwargs[name])}"
                )
        if num_key_value_heads is None:
            num_key_value_heads = num_heads
        super().__init__(num_heads, num_key_value_heads, **{**kwargs, "causal": False})

    def build(  # type: ignore[override]
        self, query_shape: Shape, value_shape: Shape | None = None
    ) -> None:
        if value_shape is None:
            raise ValueError(
                f"Layer '{self.name}' does not know the width of `value` yet. Call it "
                "once with one, or call `build` with the shapes of both."
            )
        check_sequence_shape(self.name, value_shape, "`value`")
        super().build(query_shape, value_shape)

    def create_cache(
        self, batch_size: int, max_length: int, source_length: int | None = None
    ) -> Cache:
        """Makes an empty cache for sources of up to `source_length` positions.

        `None` means `max_length`, how many positions the queries' sequence may have.
        """
        slots = check_positive_int("max_length", max_length)
        if source_length is not None:
            slots = check_positive_int("source_length", source_length)
        cache = self._empty_cache(batch_size, slots)
        return {**cache, "padding_mask": ops.zeros((batch_size, slots), "bool")}

    def grow_cache(self, cache: Cache, max_length: int) -> Tensor:
        """Returns the cache as it is: the length of a source does not change."""
        return cache

    def can_rewind(self, cache: Cache, from_index: int, to_index: int) -> bool:
        """Returns true: the cache holds the source, which no query changes."""
        return True

    def call(  # type: ignore[override]
        self,
        query: Tensor,
        value: Tensor = None,
        value_padding_mask: Mask = None,
        attention_mask: Mask = None,
        padding_mask: Mask = None,
        cache: Cache = None,
        cache_update_index: Index = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
    ) -> Any:
        if value is None and cache is None:
            raise ValueError(
                f"Layer '{self.name}' needs `value`, the sequence to attend to, or a "
                "`cache` to which an earlier call has written it. Received neither."
            )
        if value is None and value_padding_mask is not None:
            raise ValueError(
                f"Layer '{self.name}' was called with `value_padding_mask` (a block's "
                "`encoder_padding_mask`) but without a source. The cache holds the mask "
                "of the source that it holds: leave it out. Received: "
                f"value_padding_mask={describe(value_padding_mask)}"
            )
        check_attention_mask(attention_mask, query, value if cache is None else None)
        query = zero_padding(query, padding_mask)
        q = self.project_query(query)  # (batch, length, num_heads, key_dim)
        new, past, mask = None, None, value_padding_mask
        if value is not None:
            self._check_source(query, value, mask)
            mask = None if mask is None else ops.cast(mask, "bool")
            source = zero_padding(value, mask)
            # (batch, source_length, num_key_value_heads, dim)
            new = self.project_key_value(source, source)
            length = ops.shape(value)[1]
        if cache is not None:
            given = new is not None
            cache = self._with_source(cache, new, mask, cache_update_index)
            mask = cache.pop("padding_mask")
            new, past = None, self.cache_policy.read(cache, q.dtype)
            cache, length = {**cache, "padding_mask": mask}, mask.shape[1]
        visibility = Visibility(
            token_positions(None, ops.shape(query)[1]),
            token_positions(None, length),
            causal=False,
            key_padding_mask=mask,
            attention_mask=attention_mask,
            in_order=True,
        )
        options = (visibility, return_attention_scores, training)
        outputs = self._attend_and_project(q, new, past, *options, inputs=query)
        if cache is not None and not given:
            found = ops.where(ops.any(mask), outputs[0], float("nan"))
            outputs = (found, *outputs[1:])
        outputs = outputs if return_attention_scores else outputs[0]
        return outputs if cache is None else (outputs, cache)

    def _with_source(
        self, cache: Cache, new: Any, mask: Mask, index: Index
    ) -> dict[str, Tensor]:
        """Returns the cache with its source, which is written if it is given."""
        if new is not None:
            written = self._write(cache, new, mask)
            self._check_same(cache, written, index)
            return written
        if is_concrete(cache["padding_mask"]) and not ops.any(cache["padding_mask"]):
            raise ValueError(
                f"Layer '{self.name}' was called without `value` (a block's "
                "`encoder_sequence`), and its cache holds no source. Pass the source "
                "with the first tokens."
            )
        return dict(cache)

    def _check_same(self, cache: Cache, written: Cache, index: Index) -> None:
        """Raises an error if a source in mid-sequence is another than before."""
        before, now = cache["padding_mask"], written["padding_mask"]
        late = isinstance(index, int) and index > 0
        if not late or not (is_concrete(before) and is_concrete(now)):
            return
        same = bool(ops.all(before == now))
        if same and "key" in cache:
            pair = (ops.cast(x["key"], "float32") for x in (cache, written))
            same = bool(ops.all(ops.isclose(*pair, rtol=0.01, atol=0.01)))
        if not same:
            raise ValueError(
                f"Layer '{self.name}' was given another source at cache_update_index="
                f"{index} than the one that its cache holds. A source comes with the "
                "first tokens; for another, begin with a new cache."
            )

    def _check_source(self, query: Tensor, value: Tensor, mask: Mask) -> None:
        rows = static_size(query, 0), static_size(value, 0)
        if len(value.shape) != 3 or (None not in rows and rows[0] != rows[1]):
            raise ValueError(
                f"Layer '{self.name}' needs `value` of shape (batch, source_length, "
                "source_width), a source for each row of `query`. Received: value="
                f"{describe(value)}, query={describe(query)}"
            )
        if mask is not None:
            check_padding_mask(self.name, mask, value, "value_padding_mask")

    def _write(self, cache: Cache, new: dict[str, Tensor], mask: Mask) -> Cache:
        """Returns the cache with a source written over all of it."""
        slots, length = cache["padding_mask"].shape[1], static_size(new["value"], 1)
        if length is not None and length > slots:
            raise ValueError(
                f"A source of {length} tokens was given to a cache of layer "
                f"'{self.name}' for {slots}. Create it with a larger `source_length`."
            )
        if mask is None:
            mask = ops.ones_like(new["value"][:, :, 0, 0], dtype="bool")
        width = [[0, 0], [0, slots - ops.shape(mask)[1]]]
        # As many tokens as slots: all of them are written.
        new = {name: ops.pad(x, [*width, [0, 0], [0, 0]]) for name, x in new.items()}
        stored = {name: x for name, x in cache.items() if name != "padding_mask"}
        stored = self.cache_policy.write(stored, to_cache_layout(new), 0, None)
        return {**stored, "padding_mask": ops.pad(mask, width)}
