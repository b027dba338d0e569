"""The inputs and the token embedding that `CausalLM` needs of a backbone."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import tree

from attention.contract import Mask, Tensor, describe

NAMES = ("token_ids", "padding_mask")


def backbone_inputs(backbone: Any, token_ids: Tensor, padding_mask: Mask) -> Any:
    """Returns inputs for a backbone, in the structure of its own inputs.

    That is a dict of both, a dict of `token_ids`, or `token_ids`. Others, which are
    optional, are in a dict with the `token_ids`, or `None`.
    """
    asked = _asked_inputs(backbone)
    known = token_ids if isinstance(token_ids, dict) else {"token_ids": token_ids}
    known = {**known, "padding_mask": padding_mask}
    if isinstance(asked, dict):
        return {name: known.get(name) for name in asked}
    return tree.map_structure(lambda _: known["token_ids"], asked)


def task_inputs(backbone: Any) -> dict[str, Any]:
    """Returns the symbolic inputs of a language model, whatever the backbone's."""
    asked = _asked_inputs(backbone)
    if isinstance(asked, dict) and set(asked) >= set(NAMES):
        return asked
    return token_inputs()


def token_inputs(prefix: str = "") -> dict[str, Any]:
    """Returns symbolic `token_ids` and `padding_mask`, with a prefix to their names."""
    names = [prefix + name for name in NAMES]
    return {name: keras.Input((None,), dtype="int32", name=name) for name in names}


def check_backbone(backbone: Any) -> None:
    """Raises an error if something can't be the backbone of a `CausalLM`."""
    if not isinstance(backbone, keras.Model):
        raise TypeError(
            "`backbone` must be a `blocks.CustomBackbone` or another Keras "
            f"model of cached layers. Received: backbone={describe(backbone)}"
        )
    name = f"`backbone` '{backbone.name}'"
    asked = _asked_inputs(backbone)
    if asked is None:
        raise TypeError(
            f"{name} must be a functional (or built Sequential) model, of which it "
            "is known what goes in: `keras.Model(inputs, outputs)` with `inputs = "
            '{"token_ids": keras.Input((None,), dtype="int32")}`. Received: '
            f"{describe(backbone)}"
        )
    leaves = tree.flatten(asked)
    if isinstance(asked, dict):
        known = {*NAMES, *getattr(backbone, "prompt_inputs", ())}
        fits = "token_ids" in asked and set(asked) <= known
    else:
        fits = len(leaves) == 1
    if not fits:
        raise TypeError(
            f"{name} must take the token ids alone, or a dict of `token_ids` and, "
            "if it wants to, `padding_mask`: generation has nothing else to give. "
            f"Its inputs are {describe(asked)}"
        )
    if any(tuple(x.shape)[:2] != (None, None) for x in leaves):
        raise ValueError(
            f"{name} must take any batch size and length, as generation feeds a "
            'prompt first and single tokens then: `keras.Input((None,), dtype="int32'
            f'")`. Its inputs are {describe(asked)}'
        )
    outputs = backbone.outputs
    if len(outputs) != 1 or len(outputs[0].shape) != 3:
        raise TypeError(
            f"{name} must return one tensor of shape (batch, length, dim): the hidden "
            "states, or the logits if `compute_logits` returns what it gets. It "
            f"returns {describe(outputs)}"
        )


def token_embedding(backbone: Any) -> keras.layers.Layer:
    """Returns the layer that turns hidden states into logits.

    It is the attribute `token_embedding`, as in KerasHub's backbones, or the layer of
    a functional model that has this name.
    """
    name = "token_embedding"
    layers = {layer.name: layer for layer in backbone.layers}
    embedding = getattr(backbone, name, None) or layers.get(name)
    parameters: Any = {}
    if isinstance(embedding, keras.layers.Layer):
        parameters = inspect.signature(embedding.call).parameters
    kinds = [x.kind for x in parameters.values()]
    if "reverse" not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise TypeError(
            f"`backbone` '{backbone.name}' has no `token_embedding` that turns hidden "
            "states into logits when it is called with `reverse=True`. If its outputs "
            "are hidden states, embed the tokens with `keras.layers."
            'ReversibleEmbedding(..., name="token_embedding")`, or override '
            "`compute_logits(hidden_states)` in a subclass of `CausalLM`. If they are "
            "logits already, let `compute_logits` return what it gets. Received: "
            f"token_embedding={describe(embedding)}"
        )
    return embedding


def _asked_inputs(backbone: Any) -> Any:
    """Returns the structure of a model's inputs, or `None` where it is not known."""
    try:
        if isinstance(backbone, keras.Sequential):
            # It has no `input` before its first symbolic call.
            return backbone.inputs[0]
        return backbone.input
    except (AttributeError, ValueError):
        return None
