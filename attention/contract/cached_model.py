"""Caches for whole Keras models, whatever their topology."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree

from attention.contract.arguments import check_positive_int, describe
from attention.contract.cached_layer import CachedLayer
from attention.contract.checks import check_rewind_indices
from attention.contract.scopes import CacheScope, RecordingScope
from attention.contract.sizes import is_concrete, static_size
from attention.contract.types import Index, Mask

# Rows and tokens of the dry runs that find call sites: distinct from each other, from
# their product and from 1.
_ROWS, _LENGTH = 3, 2


class CallSites(tuple[CachedLayer, ...]):
    """The cached layers that a model calls, in call order.

    `whole_prompt` says whether some call needs a whole prompt at once (see
    `CachedLayer.whole_prompt_arguments`), so that a prefill can't be split.
    """

    whole_prompt = False


def _record(rows: int | None, run: Callable[[], Any]) -> CallSites:
    def record() -> None:
        with scope:
            run()

    scope = RecordingScope(rows)
    if keras.config.backend() == "jax" and is_concrete(ops.zeros(())):
        import jax

        # Shapes are enough; eagerly, each operation would be compiled on its own. In
        # a trace it is not needed, and variables have values in its scope only.
        with keras.StatelessScope():
            jax.eval_shape(record)
    else:
        record()
    sites = CallSites(scope.layers)
    sites.whole_prompt = scope.whole_prompt
    return sites


def find_call_sites(run: Callable[[int, int], Any], name: str) -> CallSites:
    """Returns the cached layers that a function calls, in call order.

    `run(batch_size, length)` runs the model of this name on zeros, without a cache.
    Raises a `ValueError` if a layer is called where it can have no cache, or if the
    calls depend on the length.
    """

    def record(length: int) -> CallSites:
        return _record(_ROWS, lambda: run(_ROWS, length))

    layers = record(_LENGTH)
    # A loop over the sequence calls the same layer once for each token.
    if len({id(layer) for layer in layers}) < len(layers):
        fewer = record(1)
        if [id(x) for x in fewer] != [id(x) for x in layers]:
            layer = max(layers, key=layers.count)
            raise ValueError(
                f"'{name}' calls layer '{layer.name}' ({type(layer).__name__}) "
                f"{layers.count(layer)} times on {_LENGTH} tokens and "
                f"{fewer.count(layer)} times on one, as a loop over the sequence "
                "does. Each call has a cache of its own, so the caches would not "
                "match. Call the layer once, on all tokens."
            )
    return layers


def call_sites(model: keras.Model, inputs: Any = None) -> CallSites:
    """Finds the calls of cached layers in a model, in call order.

    The model is run, without a cache, on a few tokens of zeros.

    Args:
        model: a built `keras.Model` (or layer) of any kind.
        inputs: an example of the model's inputs; needed for a subclassed
            model. Its values play no role.

    Returns:
        A tuple of layers. A layer that is called twice is in it twice. Its attribute
        `whole_prompt` says whether some call needs a whole prompt at once.

    Raises:
        TypeError: if `model` is no Keras model or layer.
        ValueError: if the model is not built, `inputs` is needed, or a layer is
            called where it can have no cache, such as in a mapped function.

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
    if inputs is None:
        specs = symbolic_inputs(model)

        def run(*sizes: int) -> Any:
            return model(tree.map_structure(lambda x: _zeros(x, *sizes), specs))

        return find_call_sites(run, model.name)
    rows = {static_size(x, 0) for x in tree.flatten(inputs)}
    return _record(rows.pop() if len(rows) == 1 else None, lambda: model(inputs))


def _zeros(spec: keras.KerasTensor, rows: int, length: int) -> Any:
    """Returns zeros for an input; `length` counts where its axis 1 may be of any size."""
    shape = [rows, *spec.shape[1:]]
    if shape[1:] and shape[1] is None:
        shape[1] = length
    return ops.zeros(shape, dtype=spec.dtype)


def symbolic_inputs(model: keras.Model) -> Any:
    """Returns the inputs of a model as a pytree of `keras.KerasTensor`s."""
    structure = getattr(model, "input", None)
    if structure is None:
        # A Sequential model has no `input` before its first symbolic call.
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
    return structure


def create_cache(
    model: keras.Model,
    batch_size: int,
    max_length: int,
    inputs: Any = None,
    source_length: int | None = None,
) -> tuple:
    """Creates an empty cache for any Keras model made of cached layers.

    Args:
        model: a built `keras.Model`: functional, Sequential, nested or
            subclassed. Shared layers get a cache for each call site.
        batch_size: int. The number of rows.
        max_length: int. How many positions each row can hold.
        inputs: an example of the model's inputs, needed for a subclassed
            model. Its values play no role.
        source_length: int or `None`, which means `max_length`. How many positions the
            source has at most that cross-attention reads.

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
    >>> tuple(cache[0]["value"].shape)  # (batch, heads, length, value_dim)
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
    sizes = (batch_size, max_length, source_length)
    return tuple(layer.create_cache(*sizes) for layer in sites)


def max_positions(sites: tuple[CachedLayer, ...]) -> int | None:
    """Returns how many positions all the layers can represent; `None`: any."""
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
            layers, or a larger capacity than `max_length`.

    Example:

    >>> import keras
    >>> from attention import MultiHeadAttention, call_sites, create_cache, grow_cache
    >>> model = keras.Sequential([keras.Input((None, 8)), MultiHeadAttention(2)])
    >>> cache = create_cache(model, batch_size=1, max_length=16)
    >>> cache = grow_cache(call_sites(model), cache, max_length=32)
    >>> cache[0]["value"].shape[2]
    32
    """
    _check_slots(sites, cache)
    return tuple(
        layer.grow_cache(slot, max_length) for layer, slot in zip(sites, cache)
    )


def can_rewind(
    sites: tuple[CachedLayer, ...], cache: tuple, from_index: int, to_index: int
) -> bool:
    """Returns whether the last positions can be taken back from a model's cache.

    It is true if it is of all layers; a recurrent layer can't. `sites` and `cache` are
    as for `grow_cache`, and the indices as for `CachedLayer.can_rewind`.

    Raises:
        ValueError: if `cache` has another number of slots than there are
            layers, or not `from_index >= to_index >= 0`, both integers.

    Example:

    >>> import keras
    >>> from attention import MultiHeadAttention, call_sites, can_rewind, create_cache
    >>> model = keras.Sequential([keras.Input((None, 8)), MultiHeadAttention(2)])
    >>> cache = create_cache(model, batch_size=1, max_length=16)
    >>> can_rewind(call_sites(model), cache, from_index=7, to_index=5)
    True
    """
    _check_slots(sites, cache)
    check_rewind_indices(from_index, to_index)
    return all(
        layer.can_rewind(slot, from_index, to_index)
        for layer, slot in zip(sites, cache)
    )


def find_not_rewindable(
    sites: tuple[CachedLayer, ...], cache: tuple, from_index: int, to_index: int
) -> CachedLayer | None:
    """Returns the innermost first layer that can't take positions back, or `None`.

    The arguments are those of `can_rewind`.
    """
    for layer, slot in zip(sites, cache):
        if not layer.can_rewind(slot, from_index, to_index):
            inner = layer.inner_layers()
            found = inner and find_not_rewindable(inner, slot, from_index, to_index)
            return found or layer
    return None


def _check_slots(sites: tuple[CachedLayer, ...], cache: tuple) -> None:
    if len(sites) != len(cache):
        raise ValueError(
            f"`cache` has {len(cache)} slots, but there are {len(sites)} cached "
            "calls in `sites`. They belong to different models."
        )


def call_with_cache(
    model: keras.Model,
    inputs: Any,
    cache: tuple,
    cache_update_index: Index,
    padding_mask: Mask | None = None,
) -> tuple[Any, tuple]:
    """Calls any Keras model made of cached layers on the next positions.

    Args:
        model: the `keras.Model` the cache was created for.
        inputs: the model's inputs for the next positions.
        cache: the tuple from `create_cache`, or from the last call.
        cache_update_index: as for `CacheScope`, and so is `padding_mask`.

    Returns:
        `(outputs, cache)`: the outputs for these positions, and the updated cache.

    Raises:
        ValueError: if the cache was made for another model or batch size, or
            the padding mask for other inputs.

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
    with CacheScope(cache, cache_update_index, padding_mask) as scope:
        outputs = model(inputs)
    return outputs, scope.cache


def write_source(model: keras.Model, sources: dict[str, Any], cache: tuple) -> tuple:
    """Writes what cross-attention attends to into a cache, and processes no token.

    Later calls need no source then. (A call on the first tokens writes it, too.)

    Args:
        model: a functional `keras.Model` whose inputs are a dict.
        sources: dict of tensors: those inputs of the model that are of the source. The
            others are of tokens.
        cache: the tuple from `create_cache`.

    Returns:
        The cache. It holds no positions of the target.

    Raises:
        ValueError: if a name is not one of the model's inputs, or its inputs are no dict.

    Example:

    >>> import keras, numpy as np
    >>> from attention import CrossAttention, MultiHeadAttention
    >>> from attention import call_with_cache, create_cache, write_source
    >>> inputs = {
    ...     "x": keras.Input((None, 8), name="x"),
    ...     "source": keras.Input((None, 8), name="source", optional=True),
    ... }
    >>> seen = MultiHeadAttention(2)(inputs["x"])
    >>> model = keras.Model(inputs, CrossAttention(2)(seen, inputs["source"]))
    >>> source = np.random.normal(size=(1, 5, 8)).astype("float32")
    >>> x = np.random.normal(size=(1, 3, 8)).astype("float32")
    >>> cache = create_cache(model, batch_size=1, max_length=4, source_length=5)
    >>> cache = write_source(model, {"source": source}, cache)
    >>> outputs, cache = call_with_cache(model, {"x": x, "source": None}, cache, 0)
    >>> expected = model({"x": x, "source": source})
    >>> bool(keras.ops.all(keras.ops.isclose(outputs, expected, atol=1e-5)))
    True
    """
    specs = symbolic_inputs(model)
    unknown = sorted(set(sources) - set(specs)) if isinstance(specs, dict) else None
    if unknown is None or unknown or not sources:
        raise ValueError(
            f"`sources` must name inputs of `model` '{model.name}', which must be a dict. "
            f"Received: sources={describe(sources)}, inputs={describe(specs)}"
        )
    rows: Any = static_size(next(iter(sources.values())), 0)
    # A token that is padding.
    given = {
        name: ops.convert_to_tensor(sources[name])
        if name in sources
        else _zeros(spec, rows, 1)
        for name, spec in specs.items()
    }
    padding = ops.zeros((rows, 1), dtype="bool")
    return call_with_cache(model, given, cache, 0, padding)[1]
