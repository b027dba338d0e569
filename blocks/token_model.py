"""The base of backbones and language models, as models of padded tokens."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import keras_hub

from attention.contract import check_right_padded, describe


def _counted(name: str) -> Callable:
    """Returns the method of a name, as one that counts a change of the weights."""

    @functools.wraps(getattr(keras_hub.models.Backbone, name))
    def method(self: TokenModel, *args: Any, **kwargs: Any) -> Any:
        with self.changing_weights():
            return getattr(super(TokenModel, self), name)(*args, **kwargs)

    return method


class TokenModel:
    """A model of `token_ids` and `padding_mask`, both of shape `(batch, length)`.

    Results kept of a model, such as a session's KV cache, are valid while its
    `weights_version` stays the same. Training and loading raise this number; assigning
    to single variables does not, as it does not look at the weights.
    """

    weights_version = 0
    # The names of inputs beside the tokens that need not be given.
    prompt_inputs: tuple[str, ...] = ()

    def check_rest(self, rest: dict[str, Any]) -> None:
        """Raises a `TypeError` if a constructor is given what no other one takes.

        Keras drops arguments of functional models that it does not know.

        Args:
            rest: dict. What goes to the constructor of KerasHub's class.
        """
        taken = {"name", "trainable"}
        if isinstance(self, keras_hub.models.Task):
            taken.add("compile")
        unknown = sorted(rest.keys() - taken)
        if not unknown:
            return
        classes = type(self).__mro__
        for cls in classes[: classes.index(TokenModel)]:
            if "__init__" in vars(cls):
                taken |= inspect.signature(cls).parameters.keys()
        name, taken = unknown[0], taken - {"args", "kwargs"}
        raise TypeError(
            f"`{type(self).__name__}` takes no argument `{name}`. It takes "
            f"{sorted(taken)}. Received: {name}={describe(rest[name])}"
        )

    @contextlib.contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Counts a change of the weights by what runs inside."""
        # Before and after, as a callback of `fit` may generate in between.
        self.weights_version += 1
        try:
            yield
        finally:
            self.weights_version += 1

    fit = _counted("fit")
    train_on_batch = _counted("train_on_batch")
    set_weights = _counted("set_weights")
    load_weights = _counted("load_weights")

    def complete(self, inputs: Any) -> Any:
        """Returns inputs with those that need not be given, as they are where not given."""
        if not isinstance(inputs, dict):
            return inputs
        return {**dict.fromkeys(self.prompt_inputs), **inputs}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self.complete(inputs)
        if isinstance(inputs, dict):
            for name, x in inputs.items():
                if x is not None and name.endswith("padding_mask"):
                    check_right_padded(x)
        return super().__call__(inputs, *args, **kwargs)  # type: ignore[misc]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Yields the paths and parameters of all weights, on torch.

        So a torch optimizer takes `lm.parameters()`, and `DistributedDataParallel` takes
        `lm`, in loops of one's own; the wrapper itself lists no parameters, and
        `lm.save_weights` saves them. `fit` needs neither. (Of KerasHub's models torch
        finds none.)
        """
        prefix = f"{prefix}." if prefix else ""
        for weight in self.weights:  # type: ignore[attr-defined]
            yield prefix + weight.path, weight.value

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras's own leaves a model with an overridden `compile` uncompiled.
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)  # type: ignore[attr-defined]
        if self.optimizer is not None and self.built:  # type: ignore[attr-defined]
            self.optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]

    def rematerialized_call(
        self, layer_call: Callable, *args: Any, **kwargs: Any
    ) -> Callable:
        # Within `keras.RematScope` its blocks are computed again, each by itself.
        return layer_call

    def export(
        self, filepath: str, format: str = "tf_saved_model", **kwargs: Any
    ) -> None:
        """Exports the model for inference, as `keras.Model.export`.

        Raises:
            ValueError: if a SavedModel is asked for on torch, from which Keras
                exports models of one input only.
        """
        backend = keras.config.backend()
        if format == "tf_saved_model" and backend == "torch":
            raise ValueError(
                f"`{type(self).__name__}.export` can't write a SavedModel on torch, "
                "where Keras exports models of one input only. Save the model, load it "
                "with KERAS_BACKEND=tensorflow (or jax), and export it there."
            )
        if format == "tf_saved_model" and backend == "jax":
            # Keras would give each input a length of its own.
            inputs = self.input  # type: ignore[attr-defined]
            shapes = {name: _polymorphic(name, x) for name, x in inputs.items()}
            options = kwargs.get("jax2tf_kwargs", {})
            kwargs["jax2tf_kwargs"] = {"polymorphic_shapes": [shapes], **options}
        super().export(filepath, format=format, **kwargs)  # type: ignore[misc]


def _polymorphic(name: str, x: keras.KerasTensor) -> str:
    """Returns the shape of an input, with a length for each sequence."""
    side = name.removesuffix("token_ids").removesuffix("padding_mask").strip("_")
    length = f"{side}_length" if side else "length"
    sizes = [length if size is None else str(size) for size in x.shape[1:]]
    return f"(batch, {', '.join(sizes)})"
