"""Repeating a call of the model on torch without the Python of its layers."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import torch
from keras import tree
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_LOGGER = logging.getLogger("blocks.generation")

# Functions whose result is no tensor and depends on no value in one; attributes, too.
_METADATA = {
    *("dim", "ndimension", "size", "stride", "numel", "nelement", "__len__"),
    *("element_size", "is_contiguous", "is_floating_point", "is_complex", "is_signed"),
    *("get_device", "type", "result_type", "storage_offset", "__hash__", "is_tensor"),
    "__get__",
}
# Functions whose result has a shape that depends on values, and those that may be told a
# size by a tensor.
_SHAPED_BY_VALUES = {
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"),
    *("bincount", "repeat_interleave"),
}
_SIZED = {
    *("arange", "linspace", "zeros", "ones", "full", "empty", "eye", "split"),
    *("tensor_split", "reshape", "view", "expand", "broadcast_to", "repeat", "tile"),
}
# Functions whose result is another each time.
_DRAWN = {
    *("rand", "randn", "randint", "randperm", "normal", "rand_like", "randn_like"),
    *("randint_like", "bernoulli", "multinomial", "poisson", "dropout"),
}
_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_WRITES = {"__setitem__", "__set__", *(f"__i{x}__" for x in _OPERATORS)}
# Functions that always do the same: layers of a model compute many masks and angles anew.
_MERGED = {
    *("__getitem__", "reshape", "view", "permute", "transpose", "movedim", "expand"),
    *("unsqueeze", "squeeze", "cat", "where", "take", "embedding", "to", "long", "int"),
    *("add", "sub", "rsub", "mul", "multiply", "div", "neg", "pow", "remainder", "abs"),
    *("minimum", "maximum", "clamp", "cos", "sin", "any", "all", "logical_and"),
    *("logical_or", "logical_not", "lt", "le", "gt", "ge", "eq", "ne"),
}
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_CONSTANTS = (bool, int, complex, str, type(None), type(...), *_OF_TORCH)
# How many numbers a constant has at most that is compared with others.
_SMALL = 1024


class _NotRepeatableError(RuntimeError):
    """What a function does depends on more than the shapes of its tensors."""


class RepeatedCalls:
    """Calls a function of tensors, whose operations are recorded once for each shape.

    On torch nothing is compiled, and most of the time of a decode step passes in the
    Python of layers, between operations. Here the second call with the same shapes is
    recorded as a graph of `torch.fx`; later ones run that graph, which does the same
    operations in the same order. A function that asks for values (as `if tensor:` does)
    is called as it is.

    Args:
        function: takes and returns pytrees of tensors and constants.
        variables: the `keras.Variable`s that it reads.
    """

    def __init__(self, function: Callable, variables: list[keras.Variable]) -> None:
        self._function, self._variables = function, variables
        # By shapes: `None` after one call, or if the call can't be recorded.
        self._graphs: dict[Any, Callable | None] = {}
        self._refused: set[Any] = set()

    def __call__(self, *args: Any) -> Any:
        leaves = list(_leaves(args))
        shapes = [(x.shape, x.dtype) if _is_tensor(x) else x for x in leaves]
        key = (torch.is_grad_enabled(), *shapes)
        repeat = self._graphs.get(key)
        if repeat is not None:
            return repeat([*self._values(), *filter(_is_tensor, leaves)])
        if key in self._graphs and key not in self._refused:
            return self._record(key, args)
        self._graphs[key] = None
        return self._function(*args)

    def _values(self) -> list[torch.Tensor]:
        return [variable.value for variable in self._variables]

    def _record(self, key: Any, args: tuple) -> Any:
        # On copies, as an attempt that fails may have written to a cache.
        copies = tree.map_structure(lambda x: x.clone() if _is_tensor(x) else x, args)
        tensors = filter(_is_tensor, _leaves(copies))
        recorder = _Recorder([*self._values(), *tensors])
        try:
            with recorder:
                outputs = self._function(*copies)
            self._graphs[key] = recorder.finish(outputs)
        except _NotRepeatableError as error:
            _LOGGER.info("Not recorded: %s", error)
            self._refused.add(key)
            return self._function(*args)
        return outputs


class _Recorder(TorchFunctionMode):
    """Records the functions of torch that are called within it.

    A tensor is an input, the result of a recorded call, or a constant: one that was made
    of no input. Any other tensor, and any value of a tensor that is not a constant, is
    refused.
    """

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self._graph, self._root = torch.fx.Graph(), torch.nn.Module()
        # What stands for each tensor, of the constants for those that are used.
        self._nodes: Any = WeakTensorKeyDictionary()
        self._constants: Any = WeakTensorKeyDictionary()
        self._constant_nodes: dict[Any, torch.fx.Node] = {}
        # The memory of nodes, and what of it is written to.
        self._memory: dict[torch.fx.Node, int] = {}
        self._written: set[int] = set()
        for i, tensor in enumerate(inputs):
            self._stands_for(self._graph.placeholder(f"input_{i}"), tensor)

    def _stands_for(self, node: torch.fx.Node, tensor: torch.Tensor) -> None:
        self._nodes[tensor], self._memory[node] = node, _memory(tensor)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, keras.Variable) for x in args):
            with self:
                values = (x.value if isinstance(x, keras.Variable) else x for x in args)
                return function(*values, **kwargs)
        name = getattr(function, "__name__", str(function))
        given = [x for x in _leaves((args, kwargs)) if _is_tensor(x)]
        constant = all(x in self._constants for x in given)
        is_write = name in _WRITES or (name[-1] == "_" and name[-2:] != "__")
        shaped = not constant and _is_shaped_by_values(name, args)
        if shaped or (constant and name in _DRAWN) or "out" in kwargs:
            raise _NotRepeatableError(f"`{name}` is called")
        if is_write and args[0] in self._constants:
            raise _NotRepeatableError(f"`{name}` writes to a constant")
        outputs = function(*args, **kwargs)
        if args and outputs is args[0] and not is_write:
            # Nothing was to do, as for `x.to("cpu")`.
            return outputs
        made = [outputs] if _is_tensor(outputs) else outputs
        made = made if isinstance(made, (list, tuple)) else []
        made = [x for x in made if _is_tensor(x)]
        if constant:
            for x in made:
                self._constants[x] = True
            return outputs
        if not made and not is_write:
            if name not in _METADATA:
                raise _NotRepeatableError(f"`{name}` asks for values")
            return outputs
        node = self._call(function, name, args, kwargs)
        if is_write:
            self._written.add(_memory(args[0]))
        if _is_tensor(outputs):
            self._stands_for(node, outputs)
        elif made:
            for i, x in enumerate(outputs):
                item = self._graph.call_function(operator.getitem, (node, i))
                self._stands_for(item, x)
        return outputs

    def _call(
        self, function: Any, name: str, args: tuple, kwargs: dict
    ) -> torch.fx.Node:
        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), self._argument)
        if name == "__get__":
            attribute = function.__self__.__name__
            return self._graph.call_function(getattr, (args[0], attribute))
        if getattr(torch.Tensor, name, None) is function:
            return self._graph.call_method(name, args, kwargs)
        if getattr(torch, name, None) is not function:
            function = _Named(function, name)
        return self._graph.call_function(function, args, kwargs)

    def _argument(self, x: Any) -> Any:
        """Returns what stands for an argument in the graph."""
        if _is_tensor(x):
            if x in self._constants and x not in self._nodes:
                self._nodes[x] = self._constant(x)
            if x not in self._nodes:
                raise _NotRepeatableError("a tensor comes from elsewhere")
            return self._nodes[x]
        if isinstance(x, np.generic):
            x = x.item()
        if isinstance(x, float):
            # Not a subclass of it, which would be written in another way.
            return float(x)
        if isinstance(x, _CONSTANTS):
            return x
        raise _NotRepeatableError(f"an argument is a {type(x).__name__}")

    def _constant(self, x: torch.Tensor) -> torch.fx.Node:
        """Returns the node of a constant; small ones that are equal have one."""
        x = x.detach()
        key: Any = len(self._constant_nodes)
        if x.numel() <= _SMALL:
            key = (x.dtype, x.shape, bytes(x.reshape(-1).view(torch.uint8).tolist()))
        if key not in self._constant_nodes:
            place = f"constant_{len(self._constant_nodes)}"
            # A copy, as whoever calls may get the tensor itself.
            self._root.register_buffer(place, x.clone())
            self._constant_nodes[key] = self._graph.get_attr(place)
        return self._constant_nodes[key]

    def _merge(self) -> None:
        """Leaves out calls that were made before, of what is nowhere written to."""
        seen: dict[Any, torch.fx.Node] = {}
        for node in list(self._graph.nodes):
            target = getattr(node.target, "function", node.target)
            # Of a method, the target is the name.
            name = getattr(target, "__name__", target)
            memory = {self._memory.get(x) for x in (node, *node.all_input_nodes)}
            if name not in _MERGED or memory & self._written:
                continue
            # Nodes are represented by their names.
            first = seen.setdefault((target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                self._graph.erase_node(node)

    def finish(self, outputs: Any) -> Callable:
        """Returns a function from a list of the inputs to the outputs."""
        leaves = list(_leaves(outputs))
        nodes = [self._argument(x) for x in leaves]
        for i, x in enumerate(leaves):
            if not _is_tensor(x):
                continue
            # Whoever has an output may write to it.
            self._written.add(_memory(x))
            if x in self._constants:
                nodes[i] = self._graph.call_method("clone", (nodes[i],))
        self._graph.output(nodes)
        self._merge()
        module = torch.fx.GraphModule(self._root, self._graph)
        structure = tree.map_structure(lambda _: 0, outputs)
        return lambda inputs: _packed(structure, iter(module(*inputs)))


class _Named:
    """A function of torch that a graph would look for in another place."""

    def __init__(self, function: Callable, name: str) -> None:
        self.function, self.__name__ = function, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _leaves(x: Any) -> Iterator[Any]:
    """Yields what is in a pytree, or in an argument of a function of torch."""
    if isinstance(x, (list, tuple)):
        for part in x:
            yield from _leaves(part)
    elif isinstance(x, dict):
        for key in sorted(x):
            yield from _leaves(x[key])
    elif isinstance(x, slice):
        yield from _leaves((x.start, x.stop, x.step))
    else:
        yield x


def _packed(structure: Any, leaves: Iterator[Any]) -> Any:
    """Returns leaves in a structure of theirs; `tree.pack_sequence_as` is slow on torch."""
    if isinstance(structure, dict):
        return {key: _packed(structure[key], leaves) for key in sorted(structure)}
    if not isinstance(structure, (list, tuple)):
        return next(leaves)
    parts = (_packed(part, leaves) for part in structure)
    kind = type(structure)
    return kind(*parts) if hasattr(structure, "_fields") else kind(parts)


def _is_shaped_by_values(name: str, args: tuple) -> bool:
    """Returns whether the shape of a result depends on values."""
    if name in ("__getitem__", "__setitem__"):
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        slices = [x for x in parts if isinstance(x, slice)]
        bounds = [y for x in slices for y in (x.start, x.stop, x.step)]
        masks = [x for x in parts if _is_tensor(x) and x.dtype == torch.bool]
        return bool(masks) or any(map(_is_tensor, bounds))
    if name in _SIZED:
        given = args if name in ("arange", "linspace") else args[1:]
        return any(map(_is_tensor, _leaves(given)))
    return name in _SHAPED_BY_VALUES or (name == "where" and len(args) == 1)
