"""The optimizer Muon, which knows what matrix each kernel is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from attention.contract import Tensor, axes_of_weights

# The Newton-Schulz iteration: a polynomial that brings singular values near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class Muon(keras.optimizers.Optimizer):
    """Trains matrices with Muon, and all other weights with AdamW.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix. So it has to
    know the matrix: a query kernel of shape `(width, heads, dim)` is one of `width` rows
    and `heads * dim` columns, kernels of experts, `(experts, width, hidden)`, are one for
    each expert. Layers of this library, and yours by `attention.declare_role` and
    `attention.declare_axes`, say so. `keras.optimizers.Muon` goes by the number of axes,
    and trains only weights of two with Muon: neither attention nor experts.

    Matrices are the kernels of projections and experts, and low-rank updates (LoRA).
    Embeddings, heads over the vocabulary, the kernels of short convolutions, norms and
    biases are trained with AdamW. Updates are scaled to the size that those of AdamW
    have in long trainings, so one `learning_rate` and `weight_decay` serve for both; in a
    few hundred steps some four times AdamW's rate is better. A matrix has one number of
    state for each weight, where AdamW has two.

    Args:
        model: the model to be trained, with its weights: after `enable_lora`. (In the
            config it is what the optimizer needs of it.)
        learning_rate: float, or a `keras.optimizers.schedules.LearningRateSchedule`.
        momentum: float. How much of Muon's Nesterov momentum stays at each step.
        rms_rate: float. The root mean square of the entries of an update of Muon, before
            it is multiplied by the learning rate.
        adam_beta_1: float. How much of AdamW's mean of gradients stays at each step.
        adam_beta_2: float. The same of its mean of their squares.
        epsilon: float. A small number that AdamW adds to what it divides by.
        weight_decay: float or `None`. This part of each weight, times the learning rate,
            is subtracted at each step.
        **kwargs: those of `keras.optimizers.Optimizer`: `global_clipnorm`, `use_ema`,
            `gradient_accumulation_steps` and so on.

    Raises:
        ValueError: if no layer says what the axes of a weight are; when it is built, if
            the weights are those of another model.

    Example:

    >>> from blocks import CausalLM, CustomBackbone, Muon
    >>> lm = CausalLM(CustomBackbone(50, 2, 2, 16, 32))
    >>> lm.compile(optimizer=Muon(lm, learning_rate=1e-3, weight_decay=0.1))

    References:

    - [Jordan et al., 2024](https://kellerjordan.github.io/posts/muon/)
    - [Liu et al., 2025](https://arxiv.org/abs/2502.16982) (the scale of updates)
    """

    def __init__(
        self,
        model: Any,
        learning_rate: Any = 0.001,
        momentum: float = 0.95,
        rms_rate: float = 0.2,
        adam_beta_1: float = 0.9,
        adam_beta_2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.004,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **kwargs)
        self.momentum, self.rms_rate = momentum, rms_rate
        self.adam_beta_1, self.adam_beta_2 = adam_beta_1, adam_beta_2
        self.epsilon = epsilon
        if not isinstance(model, dict):
            axes = axes_of_weights(model, trainable=True)
            model = {k: v.matrix for k, v in axes.items() if len(v.shape) > 1}
        # A letter for each axis (see `WeightAxes`), or `None`, by path.
        self.matrices = model

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        paths = [x.path for x in variables if len(x.shape) > 1]
        unknown = sorted(set(paths) - set(self.matrices))
        if unknown:
            raise ValueError(
                f"`Muon` was made for other weights than '{unknown[0]}'"
                + (f" and {len(unknown) - 1} others" if len(unknown) > 1 else "")
                + ". Make it for the model to be trained, `blocks.Muon(lm)`, when this "
                "has all its weights: after `enable_lora`."
            )
        super().build(variables)
        states: dict[int, list[Any]] = {}
        for variable in variables:
            matrix = self.matrices.get(variable.path)
            state = [matrix, self.add_variable_from_reference(variable, "momentum")]
            if matrix is None:
                state.append(self.add_variable_from_reference(variable, "velocity"))
            states |= {id(x): state for x in _parts(variable)}
        self._states = states

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        matrix, momentum, *velocity = self._states[id(variable)]
        # On TensorFlow that of an embedding may be rows, several of them for one token,
        # whose sum is to be squared. This adds them up.
        gradient = ops.reshape(gradient, momentum.shape)
        gradient = ops.cast(gradient, momentum.dtype)
        if matrix is None:
            update = self._adam_update(gradient, momentum, *velocity)
        else:
            update = self._muon_update(gradient, momentum, matrix)
        self.assign_sub(variable, ops.cast(learning_rate, momentum.dtype) * update)

    def _muon_update(
        self, gradient: Tensor, momentum: keras.Variable, matrix: str
    ) -> Tensor:
        self.assign(momentum, ops.add(gradient, self.momentum * momentum))
        update = ops.add(gradient, self.momentum * momentum)
        groups = [[i for i, x in enumerate(matrix) if x == kind] for kind in "bio"]
        order = [i for group in groups for i in group]
        sizes = [math.prod(momentum.shape[i] for i in group) for group in groups]
        update = ops.transpose(update, order)
        shape = update.shape
        update = ops.reshape(_orthogonal(ops.reshape(update, sizes)), shape)
        update = ops.transpose(update, sorted(range(len(order)), key=order.__getitem__))
        # The root mean square of the entries of an orthogonal matrix is 1 divided by this.
        return update * (self.rms_rate * max(sizes[1:]) ** 0.5)

    def _adam_update(
        self, gradient: Tensor, mean: keras.Variable, square: keras.Variable
    ) -> Tensor:
        step = ops.cast(self.iterations + 1, "float32")

        def average(variable: keras.Variable, value: Tensor, beta: float) -> Tensor:
            difference = ops.subtract(value, variable)
            self.assign_add(variable, difference * (1 - beta))
            return variable / ops.cast(1 - beta**step, variable.dtype)

        mean = average(mean, gradient, self.adam_beta_1)
        square = average(square, ops.square(gradient), self.adam_beta_2)
        return mean / (ops.sqrt(square) + self.epsilon)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "model": dict(self.matrices),
            "momentum": self.momentum,
            "rms_rate": self.rms_rate,
            "adam_beta_1": self.adam_beta_1,
            "adam_beta_2": self.adam_beta_2,
            "epsilon": self.epsilon,
        }


def _orthogonal(x: Tensor) -> Tensor:
    """Returns nearly the orthogonal matrix next to each of `(matrices, rows, columns)`."""
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        # Products of rows with rows are to be the smaller ones.
        x = ops.swapaxes(x, -1, -2)
    x = x / (ops.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(_STEPS):
        # The polynomial a x + b x^3 + c x^5 of each singular value.
        products = ops.matmul(x, ops.swapaxes(x, -1, -2))
        a, b, c = _COEFFICIENTS
        factor = b * products + c * ops.matmul(products, products)
        x = a * x + ops.matmul(factor, x)
    return ops.swapaxes(x, -1, -2) if is_tall else x


def _parts(variable: keras.Variable) -> Sequence[Any]:
    """Returns what `update_step` may get for a variable.

    On TensorFlow that is the variable of each replica.
    """
    if keras.config.backend() != "tensorflow":
        return [variable]
    import tensorflow as tf

    return tf.distribute.get_strategy().experimental_local_results(variable.value)
