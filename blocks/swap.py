"""Other parts in a model that is trained already: which weights stay."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from attention.contract import Tensor, WeightAxes, all_layers, describe, known_axes
from blocks.checkpoints.computed_weights import current_weights
from blocks.checkpoints.loading import weights_from
from blocks.custom_backbone import CustomBackbone


class SwapReport(NamedTuple):
    """What became of the weights of a model whose parts were swapped.

    Attributes:
        kept: list of str. The paths of weights that are as they were.
        adapted: dict from paths to str: the weights that were changed to fit, and how.
        new: list of str. The paths of weights that are as their initializers made them.
        dropped: list of str. The paths of the old model's weights that have no place.
    """

    kept: list[str]
    adapted: dict[str, str]
    new: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.kept)} weights kept"]
        lines += [f"adapted: {path}: {how}" for path, how in self.adapted.items()]
        lines += [f"new: {path}" for path in self.new]
        lines += [f"dropped: {path}" for path in self.dropped]
        return "\n".join(lines)


def swap_backbone(
    backbone: Any, backbone_class: type | None, changes: dict[str, Any]
) -> tuple[Any, SwapReport]:
    """Returns a backbone with the weights of another, as `CausalLM.swap`."""
    if not isinstance(backbone, CustomBackbone):
        raise TypeError(
            "`swap` makes the model anew from its configuration, and so needs a "
            f"`blocks.CustomBackbone`. Received: backbone={describe(backbone)}"
        )
    cls = type(backbone) if backbone_class is None else backbone_class
    if not (isinstance(cls, type) and issubclass(cls, CustomBackbone)):
        raise TypeError(
            "`backbone_class` must be a subclass of `blocks.CustomBackbone`, for example "
            f"of `{type(backbone).__name__}`. Received: backbone_class={describe(cls)}"
        )
    old = current_weights(backbone)
    report = SwapReport([], {}, [], [])

    def make_values(weights: Any) -> Any:
        axes, _ = known_axes(swapped)
        return functools.partial(_value_of, old, axes, report)

    config = backbone.get_config()
    if any(getattr(x, "quantization_mode", None) for x in all_layers(backbone)):
        config["dtype"] = backbone.dtype_policy  # The weights are floats again.
    config.update(changes)
    # The name of a model is that of its class.
    config.pop("name", None)
    with weights_from(make_values):
        swapped = cls.from_config(config)
    there = {weight.path for weight in swapped.weights}
    report.dropped.extend(path for path in old if path not in there)
    return swapped, report


def copy_weights_beside(old: Any, new: Any, report: SwapReport) -> None:
    """Gives a task the weights that another of its class has beside the backbone's.

    They are the same in order, not in path: Keras numbers layers without a name.
    """
    in_backbone = {weight.path for weight in old.backbone.weights}
    values = current_weights(old).items()
    given = [item for item in values if item[0] not in in_backbone]
    known = {id(weight) for weight in new.backbone.weights}
    beside = [weight for weight in new.weights if id(weight) not in known]
    for weight, item in itertools.zip_longest(beside, given):
        fits = weight is not None and item is not None
        if fits and tuple(weight.shape) == tuple(item[1].shape):
            weight.assign(item[1])
            report.kept.append(weight.path)
            continue
        if weight is not None:
            report.new.append(weight.path)
        if item is not None:
            report.dropped.append(item[0])


def _value_of(
    old: dict[str, Any], axes: dict[str, WeightAxes], report: SwapReport, weight: Any
) -> Tensor | None:
    """Returns the value of a new weight; `None` for what its initializer makes."""
    path, value = weight.path, None
    if path in old:
        given = ops.convert_to_tensor(old[path])
        if tuple(given.shape) == tuple(weight.shape):
            report.kept.append(path)
            return ops.copy(ops.cast(given, weight.dtype))
        if path in axes:
            value, how = _adapt(given, axes[path])
    if value is None:
        report.new.append(path)
        return None
    report.adapted[path] = how
    return ops.cast(value, weight.dtype)


def _adapt(value: Tensor, axes: WeightAxes) -> tuple[Tensor | None, str]:
    """Returns a weight for another number of heads, or of tokens, and how it is made.

    Fewer heads are the means of those that stood side by side; more are copies. The
    first tokens are kept, and further ones are the mean of all.
    """
    old: Any = tuple(value.shape)
    shape: Any = axes.shape
    pairs = enumerate(itertools.zip_longest(old, shape))
    axis, *others = (i for i, (x, y) in pairs if x != y)
    name = None if others or len(old) < len(shape) else axes.names[axis]
    if name == "vocabulary":
        tokens, count = old[axis], shape[axis]
        kept = ops.take(value, np.arange(min(tokens, count)), axis=axis)
        if count <= tokens:
            return kept, f"the first {count} of {tokens} tokens kept"
        mean = ops.mean(value, axis=axis, keepdims=True)
        more = ops.repeat(mean, count - tokens, axis=axis)
        how = f"{tokens} tokens kept, {count - tokens} more are their mean"
        return ops.concatenate([kept, more], axis=axis), how
    # Of inputs that are added up, a head would count more or less.
    if name != "heads" or (axes.matrix or "")[axis : axis + 1] == "i":
        return None, ""
    wanted: Any = axes.counts[axis]
    size = shape[axis] // wanted
    heads = old[axis] // size
    before, after = old[:axis], old[axis + 1 :]
    if heads % wanted == 0:
        parts = (wanted, heads // wanted, size)
        groups = ops.reshape(value, (*before, *parts, *after))
        means = ops.reshape(ops.mean(groups, axis=axis + 1), shape)
        return means, f"{heads} heads averaged into {wanted}"
    if wanted % heads == 0:
        groups = ops.reshape(value, (*before, heads, size, *after))
        copies = ops.repeat(groups, wanted // heads, axis=axis)
        return ops.reshape(copies, shape), f"{heads} heads copied to {wanted}"
    return None, ""
