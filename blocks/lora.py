"""Low-rank updates (LoRA) of projections, which are found by their roles."""

from __future__ import annotations

from typing import Any

import h5py
import keras
import keras_hub
from keras import ops

from attention.contract import (
    FEED_FORWARD_ROLES,
    ROLES,
    all_layers,
    check_positive_int,
    describe,
    role_of,
)

# What is updated where nothing else is asked for: as in the paper, and in mixers that
# project queries and values at once, all of these.
_DEFAULT = ("query", "value", "input")
_GROUPS = {"attention": ROLES, "ffn": FEED_FORWARD_ROLES}
_KINDS = (keras.layers.Dense, keras.layers.EinsumDense)
_SUFFIX = ".lora.h5"


def forget_functions(model: Any) -> None:
    """Has a model compiled anew: what was traced before has no updates."""
    model.train_function = model.test_function = model.predict_function = None


class LoraMixin:
    """The part of `blocks.CausalLM` for LoRA."""

    backbone: Any

    def enable_lora(
        self,
        rank: int,
        target: Any = None,
        alpha: float | None = None,
        target_layer_names: Any = None,
    ) -> None:
        """Freezes the backbone and adds trainable low-rank updates to it.

        Compile again before the next `fit`, as other weights are trained then. The base
        may be quantized (`quantize("int8")`, `"int4"`) before, not after.
        `save_lora_weights` and `load_lora_weights` keep the updates alone,
        `export_lora_to_peft` writes them for transformers, and `merge_lora` makes a
        model of plain weights.

        Args:
            rank: int. The rank of the updates.
            target: what is updated: roles that layers declare for their projections
                (`attention.declare_role`), such as `["query", "value"]`; `"attention"`
                or `"ffn"` for all roles of these; names of layers; `"all"` for all
                projections in blocks. `None` means queries and values, and projections
                of several of these at once.
            alpha: float or `None`. Updates are multiplied by `alpha / rank`; `None`
                means the rank.
            target_layer_names: another name of `target`, KerasHub's.

        Raises:
            TypeError: if the backbone is no `CustomBackbone`, or `target` is no string
                and no list of strings.
            ValueError: if no projection has such a role or name, or there are updates.

        Example:

        >>> from blocks import CausalLM, CustomBackbone
        >>> lm = CausalLM(CustomBackbone(50, 2, 2, 16, 32))
        >>> lm.enable_lora(4, target="attention", alpha=8)
        >>> lm.compile()

        Reference:

        - [Hu et al., 2021](https://arxiv.org/abs/2106.09685)
        """
        forget_functions(self)
        if isinstance(self.backbone, LowRankUpdates):
            self.backbone.enable_lora(rank, target, alpha, target_layer_names)
            return
        if not isinstance(self.backbone, keras_hub.models.Backbone) or alpha:
            raise TypeError(
                f"`backbone` '{self.backbone.name}' is a {type(self.backbone).__name__},"
                " which does not know its projections. Call `enable_lora(rank)` of the "
                "layers you mean, or make the backbone a `blocks.CustomBackbone`."
            )
        self.backbone.enable_lora(rank, target or target_layer_names)

    def load_lora_weights(self, filepath: Any) -> None:
        """Loads low-rank updates, which LoRA need not be enabled for.

        Args:
            filepath: str or path, which ends in `.lora.h5`, of `save_lora_weights`.

        Raises:
            ValueError: if the updates are of other layers, ranks or shapes. The model
                stays as it was.
        """
        forget_functions(self)
        with self.changing_weights():  # type: ignore[attr-defined]
            self.backbone.load_lora_weights(filepath)

    def save_lora_weights(self, filepath: Any) -> None:
        """Saves the low-rank updates alone to a file.

        Args:
            filepath: str or path, which ends in `.lora.h5`.

        Raises:
            ValueError: if there are none, or the name ends otherwise.
        """
        self.backbone.save_lora_weights(filepath)


class LowRankUpdates:
    """The methods of a backbone for LoRA."""

    def enable_lora(
        self,
        rank: int,
        target: Any = None,
        alpha: float | None = None,
        target_layer_names: Any = None,
    ) -> None:
        """Freezes all weights and adds trainable low-rank updates.

        Its arguments are those of `CausalLM.enable_lora`.

        Raises:
            TypeError: if `target` is no string and no list of strings.
            ValueError: if no projection has such a role or name, or there are updates.
        """
        forget_functions(self)
        check_positive_int("rank", rank)
        layers = _find(self, target or target_layer_names)
        _freeze(self)
        for layer in layers:
            _add_update(layer, rank, alpha)

    def save_lora_weights(self, filepath: Any) -> None:
        """Saves the low-rank updates alone to a file.

        Args:
            filepath: str or path, which ends in `.lora.h5`.

        Raises:
            ValueError: if there are none, or the name ends otherwise.
        """
        layers = _updated(self)
        if not layers:
            raise ValueError(
                "There are no low-rank updates to save. Call `enable_lora(rank)` first."
            )
        _check_name(filepath)
        with h5py.File(filepath, "w") as file:
            for path, layer in layers.items():
                group = file.create_group(path)
                group.attrs.update(rank=layer.lora_rank, alpha=layer.lora_alpha)
                for name in ("a", "b"):
                    value = getattr(layer, f"lora_kernel_{name}")
                    group[name] = ops.convert_to_numpy(value)

    def load_lora_weights(self, filepath: Any) -> None:
        """Loads low-rank updates, and enables LoRA as it was where it is not yet.

        Args:
            filepath: str or path, which ends in `.lora.h5`.

        Raises:
            ValueError: if the updates are of other layers, ranks or shapes. The model
                stays as it was.
        """
        forget_functions(self)
        with self.changing_weights():  # type: ignore[attr-defined]
            _load(self, filepath)


def _freeze(backbone: Any) -> None:
    backbone.trainable = True
    for layer in all_layers(backbone):
        if layer is not backbone:
            layer.trainable = False


def _add_update(layer: Any, rank: int, alpha: float | None) -> None:
    layer.trainable = True
    layer.enable_lora(rank, lora_alpha=alpha)
    for weight in layer.weights:
        weight.trainable = weight.name.startswith("lora_")


def _blocks(backbone: Any) -> list[Any]:
    """Returns the blocks of a backbone, of both sides if it has two."""
    return [*getattr(backbone, "encoder_layers", ()), *backbone.transformer_layers]


def projections(backbone: Any) -> dict[str, Any]:
    """Returns the layers in blocks to which LoRA applies, by path."""
    blocks = [x for block in _blocks(backbone) for x in all_layers(block)]
    found = {x.path or x.name: x for x in blocks if isinstance(x, _KINDS)}
    return dict(sorted(found.items()))


def _find(backbone: Any, target: Any) -> list[Any]:
    """Returns the projections of roles or names, or raises an error if there are none."""
    candidates = projections(backbone)
    if isinstance(target, str) and target == "all":
        return list(candidates.values())
    wanted = [target] if isinstance(target, str) else list(target or _DEFAULT)
    if not all(isinstance(x, str) for x in wanted):
        raise TypeError(
            "`target` must be a role, a list of roles or of names of layers, or None. "
            f"Received: target={describe(target)}"
        )

    def fits(layer: Any, words: Any) -> bool:
        return not {role_of(layer), layer.name}.isdisjoint(words)

    groups = [_GROUPS.get(word, (word,)) for word in wanted]
    if target is None:
        # Each block has to have some, and not each block all.
        for block in _blocks(backbone):
            inside = [x for x in all_layers(block) if isinstance(x, _KINDS)]
            if inside and not any(fits(x, wanted) for x in inside):
                raise ValueError(_none_of(wanted, inside, f" of block '{block.name}'"))
    for group in [] if target is None else groups:
        if not any(fits(x, group) for x in candidates.values()):
            raise ValueError(_none_of(group, candidates.values()))
    roles = {role for group in groups for role in group}
    found = [x for x in candidates.values() if fits(x, roles)]
    if not found:
        raise ValueError(_none_of(roles, candidates.values()))
    return found


def _none_of(words: Any, layers: Any, where: str = "") -> str:
    known = sorted({role_of(x) or f"'{x.name}'" for x in layers})
    return (
        f"No projection{where} has one of {list(words)} as its role or name, so nothing "
        "would be trained there. There are (names are quoted): "
        f"{', '.join(known) or 'none'}. Pass some of them as `target`, or 'all', or "
        "declare roles in your layer: `attention.declare_role(self.wq, 'query')`."
    )


def _updated(backbone: Any) -> dict[str, Any]:
    """Returns the projections that have low-rank updates, by path."""
    return {path: x for path, x in projections(backbone).items() if x.lora_enabled}


def _load(backbone: Any, filepath: Any) -> None:
    """Reads updates from a file, and adds them to the projections that it names."""
    _check_name(filepath)
    found: dict[str, Any] = {}
    with h5py.File(filepath, "r") as file:

        def read(path: str, group: Any) -> None:
            if "rank" in group.attrs:
                options = int(group.attrs["rank"]), float(group.attrs["alpha"])
                found[path] = (*options, group["a"][...], group["b"][...])

        file.visititems(read)
    layers = _updated(backbone)
    known = projections(backbone)
    alone = set(found) ^ set(layers) if layers else set(found) - set(known)
    ranks = {x: (found[x][0], layers[x].lora_rank) for x in found if x in layers}
    wrong = [f"{x}: rank {a}, here {b}" for x, (a, b) in ranks.items() if a != b]
    if alone or wrong or not found:
        problem = "; ".join(wrong) or f"only one of both has {sorted(alone)}"
        raise ValueError(
            f"The updates in '{filepath}' do not fit this model: {problem}. Load them "
            "into a model of the same layers, before or after the same `enable_lora`."
        )
    for path, (_, _, a, b) in found.items():
        kernel = tuple(known[path].kernel.shape)
        if tuple(a.shape[:-1]) != kernel[:-1] or b.shape[-1] != kernel[-1]:
            raise ValueError(
                f"The update of '{path}' in '{filepath}' is for a kernel of another "
                f"shape than {kernel}: its factors are {a.shape} and {b.shape}."
            )
    if not layers:
        _freeze(backbone)
    for path, (rank, alpha, a, b) in found.items():
        layer = known[path]
        if not layers:
            _add_update(layer, rank, alpha)
        layer.lora_alpha = alpha
        layer.lora_kernel_a.assign(a)
        layer.lora_kernel_b.assign(b)


def _check_name(filepath: Any) -> None:
    if not str(filepath).endswith(_SUFFIX):
        raise ValueError(
            f"`filepath` must end in '{_SUFFIX}'. Received: filepath={filepath!r}"
        )
