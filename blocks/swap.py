"""Other parts in a model that is trained already: which weights stay."""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from attention.contract import Tensor, all_layers, describe
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

    def value_of(weight: Any) -> Tensor | None:
        path = weight.path
        if path not in old:
            report.new.append(path)
            return None
        value = ops.convert_to_tensor(old[path])
        if tuple(value.shape) == tuple(weight.shape):
            report.kept.append(path)
            return ops.copy(ops.cast(value, weight.dtype))
        value, how = _adapt(value, tuple(weight.shape))
        if value is None:
            report.new.append(path)
            return None
        report.adapted[path] = how
        return ops.cast(value, weight.dtype)

    config = backbone.get_config()
    if any(getattr(x, "quantization_mode", None) for x in all_layers(backbone)):
        config["dtype"] = backbone.dtype_policy  # The weights are floats again.
    config.update(changes)
    # The name of a model is that of its class.
    config.pop("name", None)
    with weights_from(lambda weights: value_of):
        swapped = cls.from_config(config)
    there = {weight.path for weight in swapped.weights}
    report.dropped.extend(path for path in old if path not in there)
    return swapped, report


def _adapt(value: Tensor, shape: tuple[int, ...]) -> tuple[Tensor | None, str]:
    """Returns a weight of heads, `(..., heads, dim)`, for another number of heads.

    Fewer are the means of those that stood side by side; more are copies. The second
    result says what was done.
    """
    old = tuple(value.shape)
    same_but_heads = len(old) == len(shape) >= 2 and (
        old[:-2] == shape[:-2] and old[-1] == shape[-1]
    )
    if not same_but_heads:
        return None, ""
    heads, wanted = old[-2], shape[-2]
    if heads % wanted == 0:
        groups = ops.reshape(value, (*old[:-2], wanted, heads // wanted, old[-1]))
        return ops.mean(groups, axis=-2), f"{heads} heads averaged into {wanted}"
    if wanted % heads == 0:
        copies = ops.repeat(value, wanted // heads, axis=-2)
        return copies, f"{heads} heads copied to {wanted}"
    return None, ""
