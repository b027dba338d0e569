"""Caches for whole Keras models, whatever their topology."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops, tree

from attention.cache_scope import CacheScope, RecordingScope
from attention.cached_layer import CachedLayer
from attention.validation import check_positive_int, describe


def call_sites(model: keras.Model, inputs: Any = None) -> tuple[CachedLayer, ...]:
    """Finds the calls of cached layers in a model, in call order.

    The model is run once, without a cache, on one token of zeros.

    Args:
        model: a built `keras.Model` (or layer): functional, Sequential or
            subclassed.
        inputs: an example of the model's inputs; needed for a subclassed
            model. Its values play no role.

    Returns:
        A tuple of layers. A layer that is called twice is in it twice.

    Raises:
        TypeError: if `model` is no Keras model or layer.
        ValueError: if the model is not built, or `inputs` is needed.

    Example:

    >>> import keras
    >>> from attention import MultiHeadAttention, call_sites
    >>> attend = MultiHeadAttention(num_heads=2)
    >>> inputs = keras.Input((None, 8))
    >>> model = keras.Model(inputs, attend(attend(inputs)))
    >>> [layer is attend for layer in call_sites(model)]
    [True, True]
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            f"`model` must be a Keras model or layer. Received: model={describe(model)}"
        )
    if not model.built:
        raise ValueError(
            f"`model` '{model.name}' is not built, so the shapes of its caches "
            "are not known. Call it once on an example of its inputs first."
        )
    with RecordingScope() as scope:
        model(_one_token(model) if inputs is None else inputs)
    return tuple(scope.layers)


def _one_token(model: keras.Model) -> Any:
    """Zeros of batch size 1 and, where the length is free, of length 1."""
    structure = getattr(model, "input", None)
    if structure is None:
        # A Sequential model has no `input` before it was called symbolically.
        flat = getattr(model, "inputs", None) or []
        structure = flat[0] if len(flat) == 1 else flat
    specs = tree.flatten(structure)
    known = specs and all(
        isinstance(x, keras.KerasTensor) and None not in tuple(x.shape)[2:]
        for x in specs
    )
    if not known:
        raise ValueError(
            f"The inputs of '{model.name}' are not known, as it is no functional "
            "or Sequential model (or has axes of unknown size besides the batch "
            "and the length). Pass `inputs`, an example of them."
        )

    def zeros(x: keras.KerasTensor) -> Any:
        shape = [1 if size is None else size for size in x.shape]
        return ops.zeros((1, *shape[1:]), dtype=x.dtype)

    return tree.map_structure(zeros, structure)


def create_cache(
    model: keras.Model, batch_size: int, max_length: int, inputs: Any = None
) -> tuple:
    """Creates an empty cache for any Keras model made of cached layers.

    Args:
        model: a built `keras.Model`: functional, Sequential, nested or
            subclassed. Shared layers get a cache for each call site.
        batch_size: int. The number of rows.
        max_length: int. How many positions each row can hold.
        inputs: an example of the model's inputs, needed for a subclassed
            model. Its values play no role.

    Returns:
        A tuple with a cache for each call of a cached layer, in call order.

    Raises:
        TypeError: if `model` is no Keras model or layer, or a size no integer.
        ValueError: if the model is not built, contains no cached layer, or
            can't represent `max_length` positions.

    Example:

    >>> import keras
    >>> from attention import MultiHeadAttention, create_cache
    >>> model = keras.Sequential([keras.Input((None, 8)), MultiHeadAttention(2)])
    >>> cache = create_cache(model, batch_size=3, max_length=16)
    >>> tuple(cache[0]["key"].shape)  # (batch, heads, length, key_dim)
    (3, 2, 16, 4)
    """
    batch_size = check_positive_int("batch_size", batch_size)
    max_length = check_positive_int("max_length", max_length)
    sites = call_sites(model, inputs)
    if not sites:
        raise ValueError(
            f"`model` '{model.name}' calls no cached layer, so there is nothing "
            "to cache. Its sequence layers must be subclasses of `CachedLayer`."
        )
    limit = max_positions(sites)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"`model` '{model.name}' can represent {limit} positions (its "
            f"learned position embedding). Received: max_length={max_length}"
        )
    return tuple(layer.create_cache(batch_size, max_length) for layer in sites)


def max_positions(sites: tuple[CachedLayer, ...]) -> int | None:
    """The largest number of positions all the layers can represent, or `None`."""
    limits = [layer.max_sequence_length for layer in sites]
    return min((x for x in limits if x is not None), default=None)


def grow_cache(sites: tuple[CachedLayer, ...], cache: tuple, max_length: int) -> tuple:
    """Copies a model's cache into a larger one.

    Args:
        sites: the model's cached layers in call order, from `call_sites` or
            the `layers` of a `NewCacheScope`.
        cache: the model's cache.
        max_length: int. How many positions each row can hold from now on.

    Returns:
        A cache with the same contents.

    Raises:
        ValueError: if `cache` has another number of slots than there are
            layers, or `max_length` is smaller than what it holds.

    Example:

    >>> import keras
    >>> from attention import MultiHeadAttention, call_sites, create_cache, grow_cache
    >>> model = keras.Sequential([keras.Input((None, 8)), MultiHeadAttention(2)])
    >>> cache = create_cache(model, batch_size=1, max_length=16)
    >>> cache = grow_cache(call_sites(model), cache, max_length=32)
    >>> cache[0]["key"].shape[2]
    32
    """
    if len(sites) != len(cache):
        raise ValueError(
            f"`cache` has {len(cache)} slots, but there are {len(sites)} cached "
            "calls in `sites`. They belong to different models."
        )
    return tuple(
        layer.grow_cache(slot, max_length) for layer, slot in zip(sites, cache)
    )


def call_with_cache(
    model: keras.Model, inputs: Any, cache: tuple, cache_update_index: Any
) -> tuple[Any, tuple]:
    """Calls any Keras model made of cached layers on the next positions.

    Args:
        model: the `keras.Model` the cache was created for.
        inputs: the model's inputs for the next positions.
        cache: the tuple from `create_cache`, or from the last call.
        cache_update_index: int, integer scalar tensor, or integer tensor of
            shape `(batch_size,)`. How many positions the cache has absorbed.

    Returns:
        `(outputs, cache)`: what the model returns for these positions, and the
        updated cache.

    Raises:
        ValueError: if the cache was made for another model or batch size.

    Example:

    >>> import keras, numpy as np
    >>> from keras import ops
    >>> from attention import MultiHeadAttention, call_with_cache, create_cache
    >>> model = keras.Sequential([keras.Input((None, 8)), MultiHeadAttention(2)])
    >>> x = np.random.normal(size=(1, 5, 8)).astype("float32")
    >>> cache = create_cache(model, batch_size=1, max_length=8)
    >>> head, cache = call_with_cache(model, x[:, :3], cache, 0)
    >>> tail, cache = call_with_cache(model, x[:, 3:], cache, 3)
    >>> bool(ops.all(ops.isclose(tail, model(x)[:, 3:], atol=1e-5)))
    True
    """
    with CacheScope(cache, cache_update_index) as scope:
        outputs = model(inputs)
    return outputs, scope.cache
