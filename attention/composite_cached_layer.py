"""A cached layer made of other layers, whose caches it creates and passes on."""

from __future__ import annotations

from typing import Any

from keras import ops

from attention.cache_scope import CacheScope, RecordingScope
from attention.cached_layer import (
    CachedLayer,
    Untracked,
    parameters,
    share_padding_mask,
)
from attention.cached_model import grow_cache, max_positions


class CompositeCachedLayer(CachedLayer):
    """A cached layer made of other layers, cached or not.

    A subclass writes `transform(x, padding_mask=None, training=None)` in plain
    Keras. The caches of the cached layers it calls are created and passed
    along by this class: `create_cache` runs `transform` on one token of zeros
    to find the call sites, and `call` runs it in a `CacheScope`. A layer that
    is called twice has two caches.

    Inner cached layers that `transform` calls without a padding mask use the
    one of this layer.

    Args:
        **kwargs: arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Example:

    >>> import keras, numpy as np
    >>> from keras import ops
    >>> from attention import CompositeCachedLayer, MultiHeadAttention
    >>> class TwoAttentions(CompositeCachedLayer):
    ...     def build(self, inputs_shape):
    ...         self.first = MultiHeadAttention(num_heads=2)
    ...         self.first.build(inputs_shape)
    ...         self.second = MultiHeadAttention(num_heads=4)
    ...         self.second.build(inputs_shape)
    ...     def transform(self, x, padding_mask=None, training=None):
    ...         return x + self.second(self.first(x))
    >>> layer = TwoAttentions()
    >>> x = np.random.normal(size=(1, 3, 8)).astype("float32")
    >>> full = layer(x)
    >>> cache = layer.create_cache(batch_size=1, max_length=3)
    >>> head, cache = layer(x[:, :2], cache=cache, cache_update_index=0)
    >>> tail, cache = layer(x[:, 2:], cache=cache, cache_update_index=2)
    >>> bool(ops.all(ops.isclose(tail, full[:, 2:], atol=1e-5)))
    True
    """

    def transform(self, x: Any, padding_mask: Any = None, training: Any = None) -> Any:
        """The computation, written once, without a word about caches."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement `transform(x, "
            "padding_mask=None, training=None)`."
        )

    def call(
        self,
        x: Any,
        padding_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        training: Any = None,
    ) -> Any:
        if cache is None:
            return self._transform(x, padding_mask, training)
        with CacheScope(cache, cache_update_index) as scope:
            outputs = self._transform(x, padding_mask, training)
        return outputs, scope.cache

    def create_cache(self, batch_size: int, max_length: int) -> tuple:
        return tuple(
            layer.create_cache(batch_size, max_length) for layer in self._call_sites()
        )

    def grow_cache(self, cache: Any, max_length: int) -> tuple:
        return grow_cache(self._call_sites(), cache, max_length)

    @property
    def max_sequence_length(self) -> int | None:  # type: ignore[override]
        return max_positions(self._call_sites())

    def _transform(self, x: Any, padding_mask: Any, training: Any) -> Any:
        arguments = {"padding_mask": padding_mask, "training": training}
        accepted = parameters(type(self).transform)
        arguments = {k: v for k, v in arguments.items() if k in accepted}
        with share_padding_mask(padding_mask):
            return self.transform(x, **arguments)

    def _call_sites(self) -> tuple[CachedLayer, ...]:
        """The cached layers that `transform` calls, in call order."""
        sites = self.__dict__.get("_call_site_memo")
        if sites is None:
            sites = Untracked()
            sites.value = tuple(self._record_call_sites())
            self._call_site_memo = sites
        return sites.value

    def _record_call_sites(self) -> list[CachedLayer]:
        if not self.built:
            raise ValueError(
                f"Layer '{self.name}' has no weights yet, so its caches can't "
                "be sized. Call it once, or call its `build` with the shape of "
                "its inputs, before `create_cache`."
            )
        config = self.get_build_config() or {}
        shapes = config.get("shapes_dict") or {"input": config.get("input_shape")}
        shape = tuple(next(iter(shapes.values())))
        zeros = ops.zeros((1, 1, *shape[2:]), dtype=self.compute_dtype)
        with RecordingScope() as scope:
            self._transform(zeros, None, False)
        return scope.layers
