"""How a language model computes its loss and its metrics in `fit` and `evaluate`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
from keras import ops

from attention.contract import (
    SegmentScope,
    Tensor,
    Untracked,
    all_layers,
    is_tensor,
)
from blocks.training.chunked_loss import UsedVariables, chunked_sums
from blocks.training.gradients import sum_over_replicas
from blocks.training.perplexity import Perplexity
from blocks.training.token_crossentropy import (
    TokenCrossentropy,
    for_tokens,
    leave_out,
)
from blocks.training.tokens_per_second import MeanLoss, add_count, hand_over_counts

_ACCURACY = ("accuracy", "acc", "sparse_categorical_accuracy")
# The metrics that are computed with the loss, in the order of the sums after its own.
_COMPUTED = (Perplexity, keras.metrics.SparseCategoricalAccuracy)
# The model in whose step `call` is to return hidden states. Replicas run in threads.
_MODEL: contextvars.ContextVar[Any] = contextvars.ContextVar("model", default=None)


class TrainingMixin:
    """The training step of `blocks.CausalLM`, which it is a part of.

    With a `TokenCrossentropy` the mean loss is one over tokens. If no metric needs
    logits, either, a step calls the backbone only, and makes logits of a few positions
    at a time.
    """

    target_names: tuple[str, str]
    loss: Any
    sampler: Any
    # The mean loss, and the metrics that are computed together with it.
    _step_metrics: Untracked | None = None
    # Called after each step with how many tokens the epoch has trained on, or `None`.
    on_count: Any = None
    train_function: Any

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        metrics: Any = None,
        weighted_metrics: Any = "auto",
        **kwargs: Any,
    ) -> None:
        if isinstance(loss, str) and loss == "auto":
            loss = TokenCrossentropy()
        if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        given = {"metrics": metrics, "weighted_metrics": weighted_metrics}
        self._given_metrics = Untracked(None, given)
        if not any(isinstance(x, dict) for x in given.values()):
            # All of them have weights, as padding has none.
            weighted = [*(metrics or ()), *(weighted_metrics or ())]
            given = {"metrics": None, "weighted_metrics": weighted}
        self._step_metrics = None
        own = type(self).compute_loss is not TrainingMixin.compute_loss
        if _is_mean_of_tokens(loss) and not own:
            computed = self._computed_metrics(loss, metrics, weighted_metrics)
            all_of_them = computed is not None
            self._step_metrics = Untracked(all_of_them, [MeanLoss(), *(computed or ())])
            if all_of_them:
                given = {"metrics": None, "weighted_metrics": []}
        super().compile(optimizer, loss, **given, **kwargs)  # type: ignore[misc]

    def _computed_metrics(
        self, loss: TokenCrossentropy, *given: Any
    ) -> list[keras.metrics.Metric] | None:
        """Returns the metrics to compute with the loss; `None` if some need logits."""
        for name in ("call", "compute_metrics"):
            if getattr(type(self), name) is not getattr(TrainingMixin, name):
                return None
        if _changes_in_training(self):
            return None
        computed = []
        for metric in (x for part in given for x in part or ()):
            if isinstance(metric, str) and metric in _ACCURACY:
                metric = keras.metrics.SparseCategoricalAccuracy(name=metric)
            ignored = getattr(metric, "ignore_class", loss.ignore_class)
            if type(metric) not in _COMPUTED or ignored != loss.ignore_class:
                return None
            computed.append(metric)
        return computed

    def get_compile_config(self) -> dict[str, Any] | None:
        config = super().get_compile_config()  # type: ignore[misc]
        if config is not None:
            for name, value in self._given_metrics.value.items():
                config[name] = keras.saving.serialize_keras_object(value)
            config["sampler"] = keras_hub.samplers.serialize(self.sampler)
        return config

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        found = super().metrics  # type: ignore[misc]
        if self._step_metrics is None:
            return found
        # Keras's own mean of the loss counts rows, and its container of metrics is empty
        # where all are computed here.
        replaced = ["loss", "compile_metrics"] if self._step_metrics.key else ["loss"]
        others = [x for x in found if x.name not in replaced]
        return [*self._step_metrics.value, *others]

    def make_train_function(self, force: bool = False) -> None:
        made = self.train_function
        super().make_train_function(force)  # type: ignore[misc]
        if self.train_function is not made:
            self.train_function = hand_over_counts(self.train_function, self)

    def train_step(self, *args: Any) -> Any:
        with self._step():
            outputs = super().train_step(*args)  # type: ignore[misc]
        if self._step_metrics is not None:
            add_count(outputs, self._step_metrics.value[0], self)
        return outputs

    def test_step(self, *args: Any) -> Any:
        with self._step():
            return super().test_step(*args)  # type: ignore[misc]

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        all_are_computed = self._step_metrics and self._step_metrics.key
        before = _MODEL.set(self if all_are_computed else None)
        try:
            yield
        finally:
            _MODEL.reset(before)

    @property
    def _without_logits(self) -> bool:
        """Returns whether this is a step in which nothing needs the logits."""
        return _MODEL.get() is self

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Tensor:
        segment_ids = None
        # On JAX Keras trains and predicts by this method.
        inputs = self.complete(inputs)  # type: ignore[attr-defined]
        if isinstance(inputs, dict):
            segment_ids = inputs.get("segment_ids")
            inputs = {x: inputs[x] for x in self.input if x in inputs}  # type: ignore[attr-defined]
        with SegmentScope(segment_ids):
            if not self._without_logits:
                return super().call(inputs, training=training, mask=mask)  # type: ignore[misc]
            return self.compute_hidden_states(inputs, training=training)  # type: ignore[attr-defined]

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        weights = self._token_weights(x, y, sample_weight)
        if self._step_metrics is None:
            if is_tensor(y) and _divides_by_size(self.loss):
                # As for masks of Keras, the mean is one of what is no padding.
                real = ops.mean(ops.cast(x[self.target_names[1]], "float32"))
                weights = ops.divide_no_nan(weights, real)
            return super().compute_loss(x, y, y_pred, weights, training)  # type: ignore[misc]
        if self._without_logits:
            sums = self._sums_of_hidden_states(y_pred, y, weights, training)
        else:
            sums = self._sums_of_logits(y_pred, y, weights)
        count = ops.sum(weights)
        tokens = ops.sum(ops.cast(x[self.target_names[1]], "float32"))
        both, replicas = sum_over_replicas(ops.stack([count, tokens]))
        added = sum(ops.sum(other) for other in self.losses)  # type: ignore[attr-defined]
        # The gradients of replicas are summed.
        loss = ops.divide_no_nan(sums[0], both[0]) + added / replicas
        mean, *others = self._step_metrics.value
        value = ops.divide_no_nan(sums[0], count) + added
        mean.update_state(ops.stop_gradient(value), count)
        mean.count_tokens(both[1])
        for metric in others:
            total = sums[1 + _COMPUTED.index(type(metric))]
            value = ops.divide_no_nan(ops.stop_gradient(total), count)
            keras.metrics.Mean.update_state(metric, value, count)
        return loss

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Tensor]:
        if self._without_logits:
            return self.get_metrics_result()  # type: ignore[attr-defined]
        weights = self._token_weights(x, y, sample_weight)
        return super().compute_metrics(x, y, y_pred, weights)  # type: ignore[misc]

    def _token_weights(self, x: Any, y: Any, sample_weight: Any) -> Any:
        """Returns the weights of targets, of which padding has none."""
        if not is_tensor(y):
            # Of several outputs, or none: only the model's author knows.
            return sample_weight
        weights = ops.cast(x[self.target_names[1]], "float32")
        if sample_weight is not None:
            weights = weights * for_tokens(sample_weight, y)
        return leave_out(y, getattr(self.loss, "ignore_class", None), weights)

    def _sums_of_logits(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Any:
        """Returns the weighted sums of the loss, of cross-entropies and of hits."""
        *parts, hits = self.loss.scores(targets, logits)
        if any(type(x) is _COMPUTED[1] for x in self._step_metrics.value):  # type: ignore[union-attr]
            parts.append(hits)
        return ops.stack([ops.sum(part * weights) for part in parts])

    def _sums_of_hidden_states(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, training: bool
    ) -> Any:
        def score(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            logits = self.compute_logits(hidden)  # type: ignore[attr-defined]
            return self._sums_of_logits(logits, targets, weights)

        with UsedVariables(self.variables) as used:  # type: ignore[attr-defined]
            example = score(hidden[:1, :1], targets[:1, :1], weights[:1, :1])
        sizes = example.shape[0], self.output.shape[-1]  # type: ignore[attr-defined]
        return chunked_sums(
            score, sizes, used.find(), hidden, targets, weights, training
        )


def _changes_in_training(task: Any) -> bool:
    """Returns whether a layer of the head acts in another way in training.

    It is one that draws numbers, as dropout, or that updates weights itself.
    """
    others = [*all_layers(task.backbone), *all_layers(task.preprocessor)]
    known = {id(layer) for layer in (task, *others)}
    head = [x for x in all_layers(task) if id(x) not in known]
    return any(
        len(x.variables) > len(x.weights) or (x.trainable and x.non_trainable_weights)
        for x in head
    )


def _divides_by_size(loss: Any) -> bool:
    # Names and functions become losses that do.
    return getattr(loss, "reduction", "sum_over_batch_size") == "sum_over_batch_size"


def _is_mean_of_tokens(loss: Any) -> bool:
    known = isinstance(loss, TokenCrossentropy)
    return known and loss.reduction == "mean_with_sample_weight"
