"""The tables from published configurations and names of weights to ours."""

from __future__ import annotations

import importlib
import pathlib
import pkgutil
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from attention.contract import describe
from blocks.checkpoints.conversions import Conversion, to_conversion

REQUIRED = object()


class Entry(NamedTuple):
    """Tensors of a checkpoint and the weights that they are.

    Attributes:
        names: list of str. The tensors' names.
        paths: list of str. The weights' paths.
        conversion: from one to the other.
        is_head: bool. Whether they are the head's of a task, which a checkpoint may lack.
    """

    names: list[str]
    paths: list[str]
    conversion: Conversion
    is_head: bool = False


class Architecture:
    """A published architecture: what its configuration and tensors are called here.

    A subclass is a table. It is registered by `register_architecture`, and then
    `CausalLM.from_preset` reads folders whose `config.json` has its `model_type`, and
    `export_to_transformers` writes them.

    Attributes:
        model_type: str. The `model_type` of configurations.
        transformers_class: str. The name of transformers' class; empty where it has
            none, and then such models are read and not exported.
        backbone_class: the `blocks.CustomBackbone` that computes it.
        config: dict from arguments of the backbone to keys of a configuration, or to
            pairs of a key and the value that it has where it is missing. Of rotary
            positions, the keys are `rope_theta`, `rope_scaling` (`None`, or as for
            `attention.RotaryPosition`) and `partial_rotary_factor`, however a file
            spells them.
        aliases: dict from keys that some files have to those that `config` has for the
            same. Both are written.
        same: dict from keys of a configuration to others, of which the backbone has one
            value for both. Both are written.
        constants: dict from keys of a configuration to the only value that the
            backbone computes, or a tuple of values that mean the same; also what a
            missing key means.
        weights: dict from names of tensors to paths of weights or a `Conversion`.
        layer_prefix: str. What the names of a block's tensors begin with; `{i}` stands
            for its number.
        layer_weights: as `weights`, for each block; paths begin within the block. `{e}`
            in a name stands for each number along the weight's first axis (`Stacked`).
        encoder_layer_prefix: as `layer_prefix`, for the blocks of an encoder, and so is
            `encoder_layer_weights`.
        base_prefix: str. What a checkpoint of the backbone alone leaves out of names.
        copies: dict from names of tensors to tuples of others under which files may hold
            the same numbers, besides or instead.
        optional: tuple of str. Names of tensors that files may lack; the weight is then
            what its initializer makes.
        ignored: tuple of str. Ends of names of tensors that are no weights.
        classes: dict from tasks, such as `"masked_lm"`, and `"backbone"` to the names of
            transformers' classes, of models that are no causal language models.
        head_weights: dict from tasks to tables as `weights`, of their heads. What a
            checkpoint lacks of them is drawn.
        head_prefixes: tuple of str. Beginnings of names of tensors of heads, which are
            no weights of a model without the head.

    Example:

    >>> from blocks import CustomBackbone
    >>> from blocks.checkpoints import Architecture, register_architecture
    >>> class TinyBackbone(CustomBackbone):
    ...     pass
    >>> @register_architecture
    ... class Tiny(Architecture):
    ...     model_type = "tiny"
    ...     backbone_class = TinyBackbone
    ...     config = {"vocabulary_size": "vocab_size", "num_layers": "depth"}
    ...     weights = {"embed.weight": "token_embedding/embeddings"}
    ...     layer_prefix = "blocks.{i}."
    ...     layer_weights = {"query.weight": "self_attention/query/kernel"}
    >>> Tiny().read_config({"vocab_size": 9, "depth": 2})
    {'vocabulary_size': 9, 'num_layers': 2}
    """

    model_type: ClassVar[str]
    transformers_class: ClassVar[str] = ""
    backbone_class: ClassVar[type]
    config: ClassVar[dict[str, Any]] = {}
    aliases: ClassVar[dict[str, str]] = {}
    same: ClassVar[dict[str, str]] = {}
    constants: ClassVar[dict[str, Any]] = {}
    weights: ClassVar[dict[str, Any]] = {}
    layer_prefix: ClassVar[str] = ""
    layer_weights: ClassVar[dict[str, Any]] = {}
    encoder_layer_prefix: ClassVar[str] = ""
    encoder_layer_weights: ClassVar[dict[str, Any]] = {}
    base_prefix: ClassVar[str] = ""
    copies: ClassVar[dict[str, tuple[str, ...]]] = {}
    optional: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)
    classes: ClassVar[dict[str, str]] = {}
    head_weights: ClassVar[dict[str, dict[str, Any]]] = {}
    head_prefixes: ClassVar[tuple[str, ...]] = ()

    def read_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Returns arguments of the backbone for a published configuration.

        Raises:
            ValueError: if a key is missing, or has a value that the backbone does not
                compute.
        """
        arguments, read = {}, {}
        values = ((key, config.get(x)) for x, key in self.aliases.items())
        named = {key: value for key, value in values if value is not None}
        spelled = with_plain_rotary({**config, **named})
        for name, key in self.config.items():
            key, default = key if isinstance(key, tuple) else (key, REQUIRED)
            value = spelled.get(key, default)
            if value is REQUIRED:
                raise ValueError(
                    f"The configuration of model type '{self.model_type}' has no "
                    f"'{key}'. It has {sorted(config)}"
                )
            arguments[name] = read[key] = value
        for key, other in self.same.items():
            if config.get(key) not in (None, read[other]):
                raise ValueError(
                    f"The configuration has {key}={config[key]!r} and {other}="
                    f"{read[other]!r}, and '{self.model_type}' is computed here where "
                    "both are the same."
                )
        for key, only in self.constants.items():
            known = only if isinstance(only, tuple) else (only,)
            value = config.get(key, known[0])
            if value not in known:
                raise ValueError(
                    f"The configuration has {key}={value!r}, and '{self.model_type}' "
                    f"is computed here for {key}={only!r} only."
                )
        return arguments

    def write_config(self, backbone: Any) -> dict[str, Any]:
        """Returns the published configuration of a backbone, of `backbone_class`."""
        config: dict[str, Any] = {"model_type": self.model_type}
        if self.transformers_class:
            config["architectures"] = [self.transformers_class]
        for key, only in self.constants.items():
            config[key] = only[0] if isinstance(only, tuple) else only
        for name, key in self.config.items():
            config[key[0] if isinstance(key, tuple) else key] = getattr(backbone, name)
        if "rope_theta" in config:
            config["rope_parameters"] = _rope_parameters(config)
        others = {**self.aliases, **self.same}
        return {**config, **{x: config[key] for x, key in others.items()}}

    def table(self, backbone: Any) -> dict[str, Any]:
        """Returns the `weights` of a backbone.

        Overridden where names or layouts of tensors depend on its arguments, and so are
        `layer_table` and `encoder_layer_table`.
        """
        return self.weights

    def layer_table(self, backbone: Any) -> dict[str, Any]:
        """Returns the `layer_weights` of a backbone."""
        return self.layer_weights

    def encoder_layer_table(self, backbone: Any) -> dict[str, Any]:
        """Returns the `encoder_layer_weights` of a backbone."""
        return self.encoder_layer_weights

    def block_prefix(self, backbone: Any, layer_index: int) -> str:
        """Returns what the names of a block's tensors begin with."""
        return self.layer_prefix.format(i=layer_index)

    def spellings(self, name: str) -> list[str]:
        """Returns the names that a tensor of the table may have in files."""
        known = [name, *self.copies.get(name, ())]
        # A checkpoint of the backbone alone leaves out `base_prefix`.
        return [*known, *(x.removeprefix(self.base_prefix) for x in known)]

    def entries(self, model: Any) -> Iterator[Entry]:
        """Yields an `Entry` for each line of the table that a model has.

        `model` is a backbone, or a task, whose head has lines of its own.
        """
        backbone = getattr(model, "backbone", model)
        shapes = {weight.path: tuple(weight.shape) for weight in model.weights}
        head = self.head_weights.get(getattr(model, "task", ""), {})
        tables, of_block = [("", "", self.table(backbone))], self.layer_table(backbone)
        for i in range(backbone.num_layers):
            prefix = self.block_prefix(backbone, i)
            tables.append((prefix, f"transformer_layer_{i}/", of_block))
        of_block = self.encoder_layer_table(backbone)
        for i in range(len(getattr(backbone, "encoder_layers", ()))):
            prefix = self.encoder_layer_prefix.format(i=i)
            tables.append((prefix, f"encoder_layer_{i}/", of_block))
        tables.append(("", "", head))
        for prefix, block, table in tables:
            for name, value in table.items():
                conversion = to_conversion(value)
                ours = [block + path for path in conversion.paths]
                if not set(ours) & set(shapes):
                    continue
                count = shapes[ours[0]][0] if "{e}" in name else 1
                names = [prefix + name.format(e=e) for e in range(count)]
                yield Entry(names, ours, conversion, is_head=table is head)

    def is_ignored(self, name: str, backbone: Any) -> bool:
        """Returns whether a tensor of this name is no weight."""
        if name.startswith(self.head_prefixes):
            return True
        head = self.weights.get(name) == "token_embedding/reverse_embeddings"
        tied = backbone.tie_word_embeddings and head
        copies = {copy for names in self.copies.values() for copy in names}
        is_copy = bool(copies & {name, self.base_prefix + name})
        return tied or is_copy or name.endswith(self.ignored)


def with_plain_rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration with one spelling of rotary positions.

    `rope_theta` and `partial_rotary_factor` have keys of their own, and `rope_scaling`
    is as for `attention.RotaryPosition`; newer files have all in `rope_parameters`.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kept = ("rope_theta", "partial_rotary_factor")
    named = {key: found.pop(key, None) or config.get(key) for key in kept}
    config = {key: value for key, value in config.items() if key not in kept}
    config.update((key, value) for key, value in named.items() if value is not None)
    kind = found.pop("type", None)
    found.setdefault("rope_type", kind)
    if found["rope_type"] in (None, "default"):
        return {**config, "rope_scaling": None}
    length = config.get("original_max_position_embeddings")
    if found["rope_type"] in ("yarn", "longrope"):
        length = length or config.get("max_position_embeddings")
    if length is not None:
        found.setdefault("original_max_position_embeddings", length)
    return {**config, "rope_scaling": found}


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the newer spelling of a written configuration's rotary positions."""
    names = ("rope_theta", "partial_rotary_factor")
    named = {key: config[key] for key in names if key in config}
    return {**named, "rope_type": "default", **(config["rope_scaling"] or {})}


_REGISTERED: dict[str, Architecture] = {}


def register_architecture(cls: type[Architecture]) -> type[Architecture]:
    """Registers an `Architecture` under its `model_type`; usable as a decorator.

    One that was registered before under the same `model_type` is replaced.

    Returns:
        The class.
    """
    if not (isinstance(cls, type) and issubclass(cls, Architecture)):
        raise TypeError(
            "`register_architecture` takes a subclass of "
            f"`blocks.checkpoints.Architecture`. Received: {describe(cls)}"
        )
    _REGISTERED[_module_name(cls.model_type)] = cls()
    return cls


def known_model_types() -> list[str]:
    """Returns the model types that can be loaded, sorted."""
    return sorted({*_modules(), *_REGISTERED})


def _module_name(model_type: str) -> str:
    return model_type.replace("-", "_")


def _modules() -> set[str]:
    """Returns the names of the modules in `blocks/models`, which are model types.

    Each is imported when it is needed: it needs `blocks` itself.
    """
    folder = pathlib.Path(__file__).parent.parent / "models"
    return {module.name for module in pkgutil.iter_modules([str(folder)])}


def find_architecture(model_type: str) -> Architecture:
    """Returns the architecture of a model type.

    Raises:
        ValueError: if there is none; it lists the known ones.
    """
    # Files may hold anything.
    name = _module_name(str(model_type))
    if name not in _REGISTERED and name in _modules():
        importlib.import_module(f"blocks.models.{name}")
    if name not in _REGISTERED:
        raise ValueError(
            f"There is no architecture for model_type={model_type!r}. The known ones "
            f"are {known_model_types()}. To add one, write a subclass of "
            "`blocks.checkpoints.Architecture` and put "
            "`@blocks.checkpoints.register_architecture` above it."
        )
    return _REGISTERED[name]


def architecture_of(backbone: Any) -> Architecture:
    """Returns the architecture that a backbone is computed by.

    Raises:
        ValueError: if none was made for its class or a parent of it.
    """
    for name in _modules():
        find_architecture(name)
    by_class: dict[type, Architecture] = {}
    for item in _REGISTERED.values():
        # The first one: others that have the same backbone are read only.
        by_class.setdefault(item.backbone_class, item)
    for cls in type(backbone).__mro__:
        if cls in by_class:
            return by_class[cls]
    raise ValueError(
        f"No published architecture is computed by a {type(backbone).__name__}. There "
        f"is one for each of {sorted(cls.__name__ for cls in by_class)} and their "
        "subclasses; `blocks.checkpoints.register_architecture` adds your own."
    )
