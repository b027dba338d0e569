"""Running a user's hook: under the right dtype policy, and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from attention import CachedLayer
from attention.contract import DType, Shape, describe


@contextlib.contextmanager
def dtype_policy_scope(policy: DType) -> Iterator[None]:
    """Makes `policy` the global dtype policy while hooks run.

    A layer that a hook makes without `dtype=` then has the policy of its block.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def float_policy(dtype: DType) -> Any:
    """Returns the dtype policy of a backbone that is to be made.

    Raises:
        ValueError: if it is not one of floats: `quantize` is for models that are made.
    """
    policy = keras.dtype_policies.get(dtype)
    if policy.quantization_mode is not None or "float" not in policy.compute_dtype:
        raise ValueError(
            "`dtype` must be a dtype or policy of floats, such as 'bfloat16' or "
            "'mixed_bfloat16'. Quantize the model that was made with one, by "
            f"`quantize`. Received: dtype={describe(dtype)}"
        )
    return policy


# Hooks of which generation keeps a cache.
_CACHED = (
    "create_attention_layer",
    "create_cross_attention_layer",
    "create_decoder",
    "create_encoder_position_embedding",
    "create_position_embedding",
)


def run_hook(owner: Any, name: str, *args: Any) -> Any:
    """Calls a hook of a block or backbone, and returns the layer that it made."""
    where = f"`{type(owner).__name__}.{name}`"
    try:
        layer = getattr(owner, name)(*args)
    except AttributeError as error:
        if error.obj is not owner:
            raise
        raise AttributeError(
            f"{where} read `self.{error.name}`, which is not set. Hooks run while the "
            f"layer or backbone is being made: set `self.{error.name}` in `__init__` "
            "before `super().__init__(...)` (in a backbone), or before the block is built."
        ) from error
    if layer is None and name.endswith("position_embedding"):
        return None
    if not isinstance(layer, keras.layers.Layer):
        what = "a class" if isinstance(layer, type) else "an instance of"
        kind = layer if isinstance(layer, type) else type(layer)
        raise TypeError(
            f"{where} must return a Keras layer. It returned {what} {kind.__name__}."
        )
    if name in _CACHED and not isinstance(layer, CachedLayer):
        raise TypeError(
            f"{where} must return a layer with `create_cache`, that is, a subclass of "
            "`attention.CachedLayer`, as generation keeps a KV cache of it. It returned "
            f"{type(layer).__name__}; `attention.MultiHeadAttention`, its siblings and "
            "`attention.PositionEmbedding` can stand in for Keras's layers."
        )
    return layer


def name_layer(layer: keras.layers.Layer, name: str) -> None:
    """Gives a new layer the name of its place in a block.

    Weights are saved, quantized and sharded by path, and an automatic name such as
    `dense_7` depends on the layers made before. A layer that is built already keeps
    its name: it is shared with another place.
    """
    if not layer.built:
        layer.name = name


def build_layer(layer: keras.layers.Layer, inputs_shape: Shape, dtype: str) -> None:
    """Makes the weights of a layer that a hook returned, unless it has them already.

    `dtype` is that of its inputs.
    """
    if layer.built:
        return
    if type(layer).build is keras.layers.Layer.build:
        # A layer that leaves building to its sublayers: Keras makes their weights
        # in a symbolic call, whereas `build` would only say that there are some.
        layer(keras.KerasTensor(inputs_shape, dtype=dtype))
    else:
        layer.build(inputs_shape)
