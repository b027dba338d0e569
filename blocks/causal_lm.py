"""The causal language model, written once for every backbone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import keras_hub
import tensorflow as tf

from attention.contract import describe
from blocks.checkpoint_mixin import CheckpointMixin
from blocks.generation.backbone_inputs import (
    backbone_inputs,
    check_backbone,
    task_inputs,
    token_embedding,
)
from blocks.generation.compilation import GenerationSizes
from blocks.generation.mixin import GenerationMixin
from blocks.generation.options import check_defaults, draws
from blocks.generation.prompts import tokenizer_size, vocabulary_size
from blocks.lora import LoraMixin
from blocks.preprocessor import CausalLMPreprocessor
from blocks.quantized_head import logits_of
from blocks.serving import Server
from blocks.token_model import TokenModel
from blocks.training.callbacks import start_training
from blocks.training.mixin import TrainingMixin
from blocks.training_data import (
    as_dataset,
    as_slices,
    batched,
    expected_end,
    from_epoch,
    is_for_keras,
    is_in_memory,
    is_tokens,
    preprocessed,
    read_samples,
)


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CausalLM(
    TokenModel,
    TrainingMixin,
    GenerationMixin,
    CheckpointMixin,
    LoraMixin,
    keras_hub.models.CausalLM,
):
    """A causal language model on any backbone made of cached layers.

    It trains with `fit` and generates with `generate`, as every KerasHub
    `CausalLM`, and knows nothing of attention: it calls the backbone on tokens
    without a cache, or inside of an `attention.CacheScope`. There is nothing to
    write for a new backbone.

    The backbone may be any functional `keras.Model` of cached layers. It takes
    the token ids, alone or as `{"token_ids": ...}`, or with a `padding_mask` in
    that dict; if it takes none, its cached layers are told all the same what is
    padding. It returns hidden states, which its `token_embedding` (an attribute
    or a layer of that name that can be called with `reverse=True`) turns into
    logits; or anything from which an overridden `compute_logits` makes them,
    such as the logits themselves.

    Args:
        backbone: a `blocks.CustomBackbone`, a `keras_hub.models.Backbone` or
            another functional model of cached layers.
        preprocessor: a `blocks.CausalLMPreprocessor` or one of KerasHub's, for
            strings in and strings out; `None` for tokens.
        generation_options: dict or `None`. Defaults for the options of each call of
            `generate` and the like, such as `{"temperature": 0.6, "top_p": 0.95}`: see
            `blocks.GenerationOptions`. Those of a published checkpoint are those of its
            `generation_config.json`. They are saved.
        generation_sizes: a `blocks.GenerationSizes`, or `None` for the default: how
            much `generate` does at once. Not saved: it depends on the machine, and
            changes no output.
        **kwargs: arguments of `keras_hub.models.CausalLM`.

    Call arguments:
        inputs: a dict of `token_ids` and `padding_mask`, both of shape
            `(batch, length)`, whatever the backbone takes.

    Returns:
        Logits of shape `(batch, length, vocabulary_size)`.

    Raises:
        TypeError: if `backbone` is no functional model of tokens, or there is
            no way from its outputs to logits.
        ValueError: if its batch size or length is fixed, or the tokenizer has more
            tokens than it.

    Example:

    >>> import numpy as np
    >>> from blocks import CausalLM, CustomBackbone
    >>> backbone = CustomBackbone(
    ...     vocabulary_size=50,
    ...     num_layers=2,
    ...     num_heads=2,
    ...     hidden_dim=16,
    ...     intermediate_dim=32,
    ...     max_sequence_length=32,
    ... )
    >>> lm = CausalLM(backbone)
    >>> lm.compile(optimizer="adam", sampler="greedy")
    >>> tokens = np.arange(1, 9, dtype="int32")[None]
    >>> x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    >>> _ = lm.fit(x, tokens, verbose=0)
    >>> out = lm.generate(x, stop_token_ids=None, max_new_tokens=4)
    >>> out["token_ids"].shape
    (1, 12)
    """

    backbone_cls = None
    preprocessor_cls = None

    def __init__(
        self,
        backbone: Any,
        preprocessor: Any = None,
        *,
        generation_options: dict[str, Any] | None = None,
        generation_sizes: GenerationSizes | None = None,
        **kwargs: Any,
    ) -> None:
        self.generation_options = check_defaults(generation_options or {})
        check_backbone(backbone)
        if type(self).compute_logits is CausalLM.compute_logits:
            token_embedding(backbone)
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        # === Functional model ===
        inputs = task_inputs(backbone)
        outputs = self.compute_logits(backbone(backbone_inputs(backbone, **inputs)))
        if len(getattr(outputs, "shape", ())) != 3:
            raise TypeError(
                f"`{type(self).__name__}.compute_logits` must return logits of shape "
                "(batch, length, vocabulary_size). It returned "
                f"{describe(outputs)}"
            )
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.generation_sizes = generation_sizes or GenerationSizes()
        size, known = tokenizer_size(preprocessor), vocabulary_size(self)
        if size is not None and known is not None and size > known:
            raise ValueError(
                f"The `preprocessor`'s tokenizer has {size} tokens, which is more than "
                f"the model's vocabulary of {known}: they don't belong together."
            )

    def compute_logits(self, hidden_states: Any) -> Any:
        """Computes the logits of the next token.

        A subclass with another head overrides it.

        Args:
            hidden_states: tensor of shape `(batch, length, hidden_dim)`.

        Returns:
            A tensor of shape `(batch, length, vocabulary_size)`.
        """
        return logits_of(token_embedding(self.backbone), hidden_states)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        if self.generation_options:
            config["generation_options"] = dict(self.generation_options)
        return config

    def compile(self, *args: Any, sampler: Any = "auto", **kwargs: Any) -> None:
        """Configures training and generation, as KerasHub's `compile`.

        Args:
            *args: see `keras_hub.models.CausalLM.compile`.
            sampler: `"auto"`, a name, such as `"greedy"`, or a `keras_hub.samplers`
                object, also of your own. `"auto"` draws as `generation_options` say, and
                is `"top_k"` if they say nothing of drawing; any other sampler takes the
                place of what they say. Of an object only its `get_config()` and its
                `variables` count, so that each call draws new numbers: a sampler that
                holds variables or other samplers returns their variables, too.
                Other changes of it take effect when you compile again.
            **kwargs: see `keras_hub.models.CausalLM.compile`. On TensorFlow
                generation is compiled by XLA, which is faster on every device,
                unless `jit_compile=False`; on training `jit_compile` has the
                same effect as everywhere in Keras. Generation keeps what was compiled
                for an equal sampler and equal settings.

        Raises:
            TypeError: if `sampler` is no sampler.
        """
        if not isinstance(sampler, (str, dict, keras_hub.samplers.Sampler)):
            raise TypeError(
                "`sampler` must be a name, such as 'greedy', or a "
                f"`keras_hub.samplers.Sampler`. Received: {describe(sampler)}"
            )
        self._draws_by_options = sampler == "auto" and draws(self.generation_options)
        if sampler == "auto":
            sampler = "greedy" if self._draws_by_options else "top_k"
        super().compile(*args, sampler=sampler, **kwargs)
        self._reset_generation(kwargs.get("jit_compile", "auto"))

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        validation_split: float | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains the model, as Keras's `fit`.

        Args:
            x: a list of strings, if the model has a preprocessor, or a dict of
                `prompts` and `responses`, of which only the responses are learned, or of
                `messages`, conversations as for `apply_chat_template`, of which only
                what the assistant says and its stop tokens are; else
                a dict of `token_ids` and `padding_mask`. Or batches of these, or of
                tuples with targets and weights: a `tf.data.Dataset`, a torch
                `DataLoader`, a `keras.utils.PyDataset`, a Grain dataset, a generator,
                `blocks.PackedDocuments`. Tokens need no preprocessor, and pass it by.
            y: the next token of each, where there is no preprocessor.
            batch_size: int or `None`, which means 32.
            sample_weight: the weight of each target, or `None`.
            validation_data: what is evaluated after each epoch.
            validation_split: float or `None`. The share of the samples, the last ones,
                that is held out for it.
            **kwargs: see `keras.Model.fit`. Samples in memory are shuffled in each
                epoch, unless `shuffle=False`.

        Returns:
            A `keras.callbacks.History`. Beside the loss there is `tokens_per_second`,
            without padding and without the first step, which compiles, if the loss is
            the default or another `TokenCrossentropy`.

        Raises:
            FloatingPointError: if the loss of a step is NaN or infinite, before a
                callback saves the weights. (A `keras.callbacks.TerminateOnNaN` among
                the callbacks takes the place of this.)
            TypeError: if `x` is no text where it must be.
            ValueError: if `x` is empty, a token of `x` or `y` is outside of the
                vocabulary, a row is not padded on the right, or a `beta` of the
                optimizer is 1 in the dtype of the weights, as 0.999 in bfloat16.
        """
        passed, seed = start_training(self, kwargs)
        x, validation_data = as_dataset(x), as_dataset(validation_data)
        in_memory = is_in_memory(x)
        x, y, sample_weight = read_samples(self, x, y, sample_weight)
        if validation_data is not None:
            parts = validation_data
            parts = parts if isinstance(parts, tuple) else (parts,)
            parts = read_samples(self, *parts)
            validation_data = keras.utils.pack_x_y_sample_weight(*parts)
            if is_in_memory(parts[0]):
                size = batch_size or 32
                validation_data, _ = batched(validation_data, size, shuffle=False)
        if in_memory:
            samples = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
            how = validation_split, seed, kwargs.pop("shuffle", True)
            x, held_out = batched(samples, batch_size or 32, *how)
            validation_data = held_out if validation_data is None else validation_data
            y = batch_size = sample_weight = validation_split = None
        if passed is not None:
            if isinstance(x, tf.data.Dataset):
                x = x.map(self.preprocess_samples, tf.data.AUTOTUNE)
            x = from_epoch(x, passed, kwargs, self.steps_per_execution)
        if is_for_keras(x):
            if isinstance(x, Iterator):
                kwargs.setdefault("shuffle", False)
            held_out = self._readable_by_keras(validation_data, batch_size)
            # Past KerasHub's `fit`, and so past the one that counts.
            with self.changing_weights():
                data = preprocessed(self, x)
                return keras.Model.fit(self, data, validation_data=held_out, **kwargs)
        kwargs.setdefault("shuffle", False)
        data = (x, y, batch_size, sample_weight, validation_data, validation_split)
        steps = kwargs.get("steps_per_epoch"), kwargs.get("validation_steps")
        with expected_end((x, steps[0]), (validation_data, steps[1])):
            return super().fit(*data, **kwargs)

    def preprocess_samples(
        self, x: Any, y: Any = None, sample_weight: Any = None
    ) -> Any:
        """Returns training samples of texts by the preprocessor; tokens as they are."""
        if is_tokens(x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        return super().preprocess_samples(x, y, sample_weight)

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        x, steps, in_memory = as_dataset(x), kwargs.get("steps"), is_in_memory(x)
        kwargs |= {"verbose": verbose}
        with expected_end((x, steps)):
            if is_for_keras(x):
                return keras.Model.evaluate(self, preprocessed(self, x), y, **kwargs)
            x, y, sample_weight = read_samples(self, x, y, sample_weight)
            if in_memory:
                samples = keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
                x, _ = batched(samples, batch_size or 32, shuffle=False)
                y = sample_weight = batch_size = None
            data = (x, y, batch_size)
            return super().evaluate(*data, sample_weight=sample_weight, **kwargs)

    def predict(
        self, x: Any = None, batch_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        x, steps, in_memory = as_dataset(x), kwargs.get("steps"), is_in_memory(x)
        with expected_end((x, steps)):
            if is_for_keras(x):
                return keras.Model.predict(self, preprocessed(self, x), *args, **kwargs)
            x, *_ = read_samples(self, x)
            if in_memory:
                x, _ = batched((x,), batch_size or 32, shuffle=False)
                batch_size = None
            return super().predict(x, batch_size, *args, **kwargs)

    def _readable_by_keras(self, data: Any, batch_size: int | None) -> Any:
        """Returns validation data of any kind, preprocessed."""
        if data is None:
            return None
        if is_for_keras(data):
            return preprocessed(self, data)
        if is_in_memory(data):
            parts = data if isinstance(data, tuple) else (data,)
            samples = keras.utils.pack_x_y_sample_weight(*parts)
            data = as_slices(samples).batch(batch_size or 32)
        return data.map(self.preprocess_samples)

    def serve(self, max_rows: int = 8, max_length: int = 1024, **kwargs: Any) -> Server:
        """Starts a thread that continues requests together, as they come.

        Args:
            max_rows: int. How many requests run at once.
            max_length: int. How many tokens a request has at most.
            **kwargs: see `blocks.Server`, which is returned.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if the sampler searches by itself, or the model does not know so
                many positions.
        """
        return Server(self, max_rows, max_length, **kwargs)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Quantizes the weights, as `keras.Model.quantize`."""
        if self.preprocessor is not None:
            # Keras asks for layers that are built: a tokenizer is by its first text.
            self.preprocessor.generate_preprocess(["a"])
        super().quantize(*args, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras's own leaves a model with an overridden `compile` uncompiled.
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def apply_chat_template(
        self,
        messages: Any,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str | list[str]:
        """Turns conversations into prompts: see `CausalLMPreprocessor`'s.

        Args:
            messages: list of dicts with `role` and `content`, or a list of such lists.
            tools: list of dicts or `None`. JSON schemas of functions.
            add_generation_prompt: bool. Whether an answer is to follow.
            **variables: for variables of the template.

        Returns:
            A string, or a list with one for each conversation.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if there is no chat template, or it fails.
        """
        if not isinstance(self.preprocessor, CausalLMPreprocessor):
            raise ValueError(
                "Chat templates belong to a `blocks.CausalLMPreprocessor`. The model's "
                f"preprocessor is {describe(self.preprocessor)}"
            )
        return self.preprocessor.apply_chat_template(
            messages, tools, add_generation_prompt, **variables
        )
