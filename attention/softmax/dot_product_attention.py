"""The base class of softmax attention: one call, whose steps are hooks."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.caches.cache_policy import to_cache_layout
from attention.caches.writes import computed_after
from attention.contract.padding import zero_padding
from attention.contract.scores import keep_scores, scores_wanted
from attention.contract.types import Cache, Index, Mask, Tensor
from attention.positions.arithmetic import (
    hide_padding,
    join_positions,
    token_positions,
)
from attention.softmax.attend import Weighting, attend_to
from attention.softmax.attention_parts import AttentionParts
from attention.softmax.call_arguments import (
    check_attention_mask,
    check_prefix_length,
    check_segment_ids,
    only_whole_prefixes,
    pack_key_value,
)
from attention.softmax.kernels import masked_softmax
from attention.softmax.visibility import Visibility


class DotProductAttention(AttentionParts):
    """The base class of attention layers: one `call`, made of steps to override.

    ```
    query, value ─► project ─► encode_positions ─► arrange_heads ─┬─► attend ─► combine_heads ─► project_output
                                                   cache ─► read ─┘     └─► write ─► cache
    ```

    `GroupedQueryAttention` and its kind are subclasses; override a step of one of
    them to change the inside of attention. Training, prefill and decoding keep
    working, as there is one `call`:

    - `project(query, value, key)` returns heads of queries, and a dict of the tensors
      to cache of each new token, such as its `"key"` and `"value"`.
    - `encode_positions(query, new, query_positions, key_positions)`.
    - `arrange_heads(query, new)`, before they are attended.
    - `compute_weights(logits, mask)`: the softmax.
    - `combine_heads(outputs, scores)`, after they have attended.
    - `project_output(outputs, inputs)`.

    `attend(...)` is the step between, and `cache_sizes()` returns the sizes of what is
    cached: a layer that caches other tensors overrides both. `make_projection(name, heads,
    inputs_shape)` makes projections in `build`.

    Args:
        num_heads: as for `GroupedQueryAttention`, and so are all others.
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Example:

    Each query attends to its two best keys only.

    >>> import numpy as np
    >>> from keras import ops
    >>> from attention import MultiHeadAttention
    >>> class BestTwo(MultiHeadAttention):
    ...     def compute_weights(self, logits, mask):
    ...         hidden = ops.where(mask, logits, -1e30)
    ...         least = ops.sort(hidden, axis=-1)[..., -2:][..., :1]
    ...         best = ops.logical_and(mask, logits >= least)
    ...         return super().compute_weights(logits, best)
    >>> layer = BestTwo(num_heads=2)
    >>> x = np.random.normal(size=(1, 5, 8)).astype("float32")
    >>> outputs, scores = layer(x, return_attention_scores=True)
    >>> int(ops.max(ops.sum(ops.cast(scores > 0, "int32"), axis=-1)))
    2
    """

    # A prefix is seen in both directions, so it is prefilled in one call.
    whole_prompt_arguments = ("prefix_length",)

    # The steps of a call, to be overridden.

    def cache_sizes(self) -> dict[str, tuple[int, int]]:
        """Returns the sizes cached for each token, a dict from names to `(heads, dim)`."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement `cache_sizes()`."
        )

    def project(
        self, query: Tensor, value: Tensor, key: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Projects inputs to heads.

        Args:
            query: tensor of shape `(batch, length, width)`, zero where padded.
            value: tensor of shape `(batch, key_length, value_width)`.
            key: tensor of shape `(batch, key_length, key_width)`; in self-attention it
                and `value` are `query` itself.

        Returns:
            The queries, of shape `(batch, length, num_heads, key_dim)`, and a dict
            of tensors of shape `(batch, key_length, heads, dim)` with the names and
            sizes of `cache_sizes`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `project`.")

    def encode_positions(
        self, query: Tensor, new: dict, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encodes positions into queries and new keys.

        Returns `query` and `new`, which `project` returned, with positions. These are
        `int32` tensors of shape `(length,)` or `(batch, length)`, and `(key_length,)`
        or `(batch, key_length)`.
        """
        if self.position is None:
            return query, new
        query, key = self.position.encode(
            query, new["key"], query_positions, key_positions
        )
        return query, {**new, "key": key}

    def arrange_heads(
        self, query: Tensor, new: dict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Arranges projected heads into those that attend and are cached.

        Returns `query`, `(batch, length, heads, dim)`, and the dict `new` of tensors of
        shape `(batch, key_length, heads, dim)`, arranged.
        """
        return query, new

    def attend(
        self,
        query: Tensor,
        new: dict[str, Tensor] | None,
        past: dict[str, Tensor] | None,
        visibility: Visibility,
        return_scores: bool = False,
        training: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attends to the visible keys.

        Args:
            query: tensor of shape `(batch, length, num_heads, key_dim)`.
            new: a dict of tensors of new tokens, `(batch, key_length, heads, dim)`;
                `None` where the cache has all keys (`CrossAttention`).
            past: `None`, or a dict of tensors as they are in the cache: `(batch,
                heads, slots, dim)`; keys `(batch, heads, dim, slots)`.
            visibility: which query sees which key, the past ones first.
            return_scores: bool. Whether the scores are needed.
            training: bool. Whether to apply dropout.

        Returns:
            The outputs, `(batch, length, num_heads, value_dim)`, and the scores,
            `(batch, num_heads, length, all keys)`, or `None`.
        """
        keys, stored = (
            None if x is None else (x["key"], x["value"]) for x in (new, past)
        )
        default = type(self).compute_weights is DotProductAttention.compute_weights
        plain = default and self.sinks is None and self.logit_soft_cap is None
        weighting = Weighting(
            self.compute_weights,
            self._logit_scale,
            self._bias,
            self.logit_soft_cap,
            self.dropout_layer if training else None,
            plain,
        )
        return attend_to(query, keys, stored, visibility, weighting, return_scores)

    def compute_weights(self, logits: Tensor, mask: Mask) -> Tensor:
        """Computes the weights of attention from its logits.

        Args:
            logits: `float32` tensor of shape `(batch, num_heads, length,
                key_length)`: scaled products of queries and keys, with biases.
            mask: `None` where all keys are visible, otherwise a boolean tensor that
                broadcasts to the shape of `logits`. A key that is not visible must
                get no weight, whatever its logit.

        Returns:
            A tensor of the shape of `logits`.
        """
        return masked_softmax(logits, mask, self.sinks)

    def combine_heads(self, outputs: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Combines heads after they have attended.

        Returns the outputs, `(batch, length, num_heads, value_dim)`, and the scores,
        `None` or `(batch, num_heads, length, key_length)`, combined.
        """
        return outputs, scores

    def project_output(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Projects outputs of heads to the width of the inputs.

        Returns outputs of shape `(batch, length, num_heads, value_dim)` in that of the
        inputs, the argument `query` of the call: `(batch, length, width)`.
        """
        if self.gate_dense is not None:
            outputs = outputs * ops.sigmoid(self.gate_dense(inputs))
        return self.output_dense(outputs)

    # The call, which runs the steps.

    def _attend_and_project(
        self,
        query: Tensor,
        new: Any,
        past: Any,
        visibility: Visibility,
        return_scores: bool,
        training: bool | None,
        inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Runs the steps from `attend` on, and returns outputs and scores."""
        options = (visibility, return_scores or scores_wanted(), training)
        outputs, scores = self.attend(query, new, past, *options)
        outputs, scores = self.combine_heads(outputs, scores)
        keep_scores(self, scores)
        return self.project_output(outputs, inputs), scores

    def __call__(  # type: ignore[override]
        self,
        query: Tensor,
        value: Tensor = None,
        key: Tensor = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Keras's attention layers are called `layer(x, x)` for self-attention.
        if value is query and (key is None or key is query):
            value = key = None
        if args or key is not None:
            args = (value, key, *args)
        elif value is not None:
            args = (value,)
        return super().__call__(query, *args, **kwargs)

    def call(
        self,
        query: Tensor,
        value: Tensor = None,
        key: Tensor = None,
        attention_mask: Mask = None,
        padding_mask: Mask = None,
        cache: Cache = None,
        cache_update_index: Index = None,
        return_attention_scores: bool = False,
        return_key_value: bool = False,
        training: bool | None = None,
        prefix_length: Tensor = None,
        segment_ids: Tensor = None,
    ) -> Any:
        index, policy = cache_update_index, self.cache_policy
        # Check.
        own_sequence = value is None and key is None
        self._check_sources(value, key, cache)
        self._check_cached_call(cache, index, segment_ids)
        value = query if value is None else value
        key = value if key is None else key
        check_attention_mask(attention_mask, query, key if cache is None else None)
        if padding_mask is not None:
            padding_mask = ops.cast(padding_mask, "bool")
        prefix_length = check_prefix_length(self.name, prefix_length, query)
        segment_ids = check_segment_ids(self.name, segment_ids, query)
        # Project.
        x = zero_padding(query, padding_mask)
        value, key = (x if source is query else source for source in (value, key))
        q, new = self.project(x, value, key)
        # Encode positions.
        positions = token_positions(index, ops.shape(x)[1], segment_ids)
        key_positions, key_padding_mask = positions, padding_mask
        if not own_sequence:
            key_positions = token_positions(None, ops.shape(key)[1])
            key_padding_mask = None
        q, new = self.encode_positions(q, new, positions, key_positions)
        q, new = self.arrange_heads(q, new)
        # Read the cache. At an index that is known to be 0 there is no past.
        past = None
        if cache is not None:
            new = {name: policy.stored(x) for name, x in new.items()}
        if cache is not None and not (isinstance(index, int) and index == 0):
            past = policy.read(cache, q.dtype)
            if prefix_length is not None:
                key_positions = hide_padding(key_positions, padding_mask)
            slots, cached = policy.num_slots(cache), ops.cast(index, "int32")
            slot_positions = policy.positions(slots, cached)
            key_positions = join_positions(slot_positions, key_positions)
            # Padding comes after all tokens whose outputs count.
            key_padding_mask = None
        # Attend.
        visibility = Visibility(
            positions,
            key_positions,
            self.causal,
            policy,
            key_padding_mask,
            attention_mask,
            prefix_length,
            None if segment_ids is None else (segment_ids, segment_ids),
            in_order=past is None,
        )
        options = (visibility, return_attention_scores, training)
        outputs, scores = self._attend_and_project(q, new, past, *options, inputs=x)
        if cache is not None and prefix_length is not None:
            outputs = only_whole_prefixes(self.name, outputs, prefix_length, index)
        if cache is not None and return_attention_scores:
            count = ops.shape(scores)[-1] - ops.shape(x)[1]
            of_past = None if past is None else scores[..., :count]
            of_new = scores[..., count:]
            scores = policy.place_scores(cache, of_past, of_new, index, padding_mask)
        # Write.
        if cache is not None or return_key_value:
            new = seen = to_cache_layout(new)
        if cache is not None:
            new = {name: computed_after(x, outputs) for name, x in new.items()}
            seen = new
            if return_key_value and past is not None:
                # The keys that these queries attended to: the past and themselves.
                cache, seen, key_positions = policy.write_and_read(
                    cache, new, index, positions, padding_mask
                )
            else:
                cache = policy.write(cache, new, index, padding_mask)
        returned = [outputs, scores] if return_attention_scores else [outputs]
        if return_key_value:
            returned.append(pack_key_value(seen, key_positions, key_padding_mask))
        outputs = tuple(returned) if len(returned) > 1 else outputs
        return outputs if cache is None else (outputs, cache)

    def create_cache(self, batch_size: int, max_length: int) -> Cache:
        cache = self._empty_cache(batch_size, max_length)
        if not self.causal:
            raise ValueError(
                f"Layer '{self.name}' was made with `causal=False`: each new "
                "token changes the outputs of all earlier ones, so there is "
                "nothing to cache. Use it without a cache, or make it causal."
            )
        return cache

    def _empty_cache(self, batch_size: int, max_length: int) -> dict[str, Any]:
        if self.key_dim is None and not self.built:
            raise ValueError(
                f"Layer '{self.name}' has no weights yet and no `key_dim`, so its "
                "cache can't be sized. Call it once, or call `build` with the shape of "
                "its inputs, before `create_cache`; or make it with `key_dim`."
            )
        return self.cache_policy.create(
            batch_size, max_length, self.cache_sizes(), self.compute_dtype
        )

    def can_rewind(self, cache: Cache, from_index: int, to_index: int) -> bool:
        same = super().can_rewind(cache, from_index, to_index)
        return same or self.cache_policy.can_rewind(cache, from_index, to_index)
