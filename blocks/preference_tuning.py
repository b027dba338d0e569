"""Training on preferences: which of two answers is better (DPO)."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from attention.contract import Tensor, check_number, describe
from blocks.causal_lm import CausalLM
from blocks.training.callbacks import start_training
from blocks.training_data import batched, from_epoch, read_columns

_TEXTS = ("prompts", "chosen", "rejected")
_SIDES = ("chosen", "rejected")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class PreferenceTuning(keras.Model):
    """Trains a language model to prefer one answer to another, by `fit`.

    It is direct preference optimization. The model's output is the margin of each pair,

    ```
    beta * (log p(chosen) - log r(chosen) - log p(rejected) + log r(rejected))
    ```

    where `p` is the language model and `r` the reference, as it was before: so training
    is binary classification, and `keras.losses.BinaryCrossentropy(from_logits=True)`,
    the default loss, is the loss of the paper. Its `label_smoothing` allows for wrong
    labels. The metric is how many pairs have a positive margin.

    Args:
        lm: a `blocks.CausalLM` with a preprocessor. It is trained in place.
        reference: `None` or a `blocks.CausalLM` of the same tokens, which is not trained.
            `None` means `lm` as it is now: with LoRA that is the base, without a copy in
            memory, and else a copy.
        beta: float. How much a change from the reference counts.
        **kwargs: arguments of `keras.Model`.

    Call arguments:
        inputs: a dict of tokens, as `preprocess` returns.

    Returns:
        The margins, a float32 tensor of shape `(batch,)`.

    Raises:
        TypeError: if `lm` or `reference` is no `blocks.CausalLM`.
        ValueError: if `lm` has no preprocessor, or `beta` is not positive.

    Example:

    >>> import keras_hub
    >>> from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone, PreferenceTuning
    >>> tokenizer = keras_hub.tokenizers.ByteTokenizer()
    >>> preprocessor = CausalLMPreprocessor(tokenizer, sequence_length=12, end_token=1)
    >>> lm = CausalLM(CustomBackbone(256, 1, 2, 8, 16), preprocessor)
    >>> lm.enable_lora(2)
    >>> tuning = PreferenceTuning(lm)
    >>> tuning.compile(optimizer="adam")
    >>> pairs = {"prompts": ["1 + 1 = "], "chosen": ["2"], "rejected": ["3"]}
    >>> history = tuning.fit(pairs, epochs=2, verbose=0)
    >>> round(history.history["loss"][0], 3)  # log(2): no pair is preferred yet
    0.693

    Reference:

    - [Rafailov et al., 2023](https://arxiv.org/abs/2305.18290)
    """

    def __init__(
        self,
        lm: CausalLM,
        reference: CausalLM | None = None,
        beta: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, model in (("lm", lm), ("reference", reference or lm)):
            if not isinstance(model, CausalLM):
                raise TypeError(
                    f"`{name}` must be a `blocks.CausalLM`. Received: "
                    f"{name}={describe(model)}"
                )
        if lm.preprocessor is None:
            raise ValueError("`lm` needs a preprocessor, which reads the texts.")
        if not (check_number("beta", beta) or 0.0) > 0:
            raise ValueError(f"`beta` must be positive. Received: beta={beta}")
        self.lm, self.beta = lm, beta
        # By it Keras decides whether the loss is scaled.
        self.dtype_policy = lm.dtype_policy
        self._updates = {id(w) for w in lm.weights if w.name == "lora_kernel_b"}
        if reference is None and not self._updates:
            reference = lm.swap()[0]
        if reference is not None:
            reference.trainable = False
        self.reference = reference
        self.built = True

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = "auto",
        *,
        metrics: Any = "auto",
        **kwargs: Any,
    ) -> None:
        if isinstance(loss, str) and loss == "auto":
            loss = keras.losses.BinaryCrossentropy(from_logits=True)
        if isinstance(metrics, str) and metrics == "auto":
            metrics = [keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)]
        super().compile(optimizer, loss, metrics=metrics, **kwargs)

    def preprocess(self, x: dict[str, Any]) -> dict[str, Tensor]:
        """Turns texts into tokens.

        Args:
            x: a dict of `prompts`, `chosen` and `rejected`, lists of as many strings.

        Returns:
            A dict of arrays of shape `(batch, sequence_length)`: for each answer the
            `token_ids` and `padding_mask` of prompt and answer, the `targets`, and the
            `weights`, which are 1 where a target belongs to the answer.

        Raises:
            TypeError: if `x` is no such dict.
            ValueError: if the lists are not of one length.
        """
        texts = read_columns(x, _TEXTS)
        if texts is None:
            raise TypeError(
                "`x` must be a dict of `prompts`, `chosen` and `rejected`, all lists of "
                f"strings. Received: x={describe(x)}"
            )
        if len({len(v) for v in texts.values()}) != 1 or not texts["prompts"]:
            raise ValueError(
                "`x` must have two answers for each prompt. Received: "
                + ", ".join(f"{len(v)} {k}" for k, v in texts.items())
            )
        prompts, *answers = texts.values()
        arrays = {}
        for side, responses in zip(_SIDES, answers):
            samples = {"prompts": prompts, "responses": responses}
            tokens, targets, weights = self.lm.preprocessor(samples)
            found = {**tokens, "targets": targets, "weights": weights}
            for name, value in found.items():
                arrays[f"{side}_{name}"] = ops.convert_to_numpy(value)
        return arrays

    def call(self, inputs: dict[str, Tensor], training: bool | None = None) -> Tensor:
        trained = self._log_probabilities(self.lm, inputs, training)
        if self.reference is None:
            # Without its updates, the model is as it was before.
            known = [
                (x, ops.zeros_like(x.value) if id(x) in self._updates else x.value)
                for x in self.lm.variables
            ]
            with keras.StatelessScope(state_mapping=known):
                reference = self._log_probabilities(self.lm, inputs, False)
        else:
            reference = self._log_probabilities(self.reference, inputs, False)
        change = trained - ops.stop_gradient(reference)
        chosen, rejected = ops.split(change, 2, axis=0)
        return self.beta * (chosen - rejected)

    def _log_probabilities(
        self, lm: CausalLM, inputs: dict[str, Tensor], training: bool | None
    ) -> Tensor:
        """Returns the log-probability of each answer, `(2 * batch,)`, chosen ones first."""
        tokens, mask, targets, weights = (
            ops.concatenate([inputs[f"{side}_{name}"] for side in _SIDES], axis=0)
            for name in ("token_ids", "padding_mask", "targets", "weights")
        )
        x = {"token_ids": tokens, "padding_mask": mask}
        logits = ops.cast(lm(x, training=training), "float32")
        chosen = ops.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_probabilities = chosen - ops.logsumexp(logits, axis=-1)
        return ops.sum(log_probabilities * ops.cast(weights, "float32"), axis=1)

    def fit(self, x: Any = None, y: Any = None, **kwargs: Any) -> Any:
        """Trains the language model, as `keras.Model.fit`.

        Args:
            x: a dict of `prompts`, `chosen` and `rejected`, lists of strings; or batches
                `(x, y)` of what `preprocess` returns, and ones.
            y: ones, where `x` is what `preprocess` returns.
            **kwargs: see `keras.Model.fit`; `validation_data` is as `x`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            FloatingPointError: if the loss of a step is NaN or infinite.
            TypeError: if `x` is no such dict.
            ValueError: if a `beta` of the optimizer is 1 in the dtype of the weights, as
                0.999 in bfloat16.
        """
        held_out = kwargs.get("validation_data")
        if _is_texts(held_out):
            kwargs["validation_data"] = self._samples(held_out)
        x, y = self._samples(x) if _is_texts(x) else (x, y)
        passed, seed = start_training(self, kwargs)
        if isinstance(x, dict) and kwargs.pop("shuffle", True):
            weights = kwargs.pop("sample_weight", None)
            samples = keras.utils.pack_x_y_sample_weight(x, y, weights)
            size = kwargs.pop("batch_size", None) or 32
            split = kwargs.pop("validation_split", None)
            x, held_out = batched(samples, size, split, seed)
            y = None
            kwargs.setdefault("validation_data", held_out)
        if passed is not None:
            x = from_epoch(x, passed, kwargs, self.steps_per_execution)
        kwargs.setdefault("shuffle", False)
        with self.lm.changing_weights():
            return super().fit(x, y, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        x, y = self._samples(x) if _is_texts(x) else (x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        x = self.preprocess(x) if _is_texts(x) else x
        return super().predict(x, *args, **kwargs)

    def _samples(self, x: Any) -> tuple[dict[str, Tensor], Tensor]:
        # The answer that was chosen is better, in each pair.
        return self.preprocess(x), ops.ones((len(x["prompts"]),), "float32")


def _is_texts(x: Any) -> bool:
    return isinstance(x, dict) and not any(key.startswith("chosen_") for key in x)
