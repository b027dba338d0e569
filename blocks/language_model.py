"""What language models of decoders, and of encoders and decoders, have in common."""

from __future__ import annotations

from typing import Any

import keras_hub

from attention.contract import describe
from blocks.checkpoint_mixin import CheckpointMixin
from blocks.fitting import FitMixin
from blocks.generation.backbone_inputs import token_embedding
from blocks.generation.compilation import GenerationSizes
from blocks.generation.mixin import GenerationMixin
from blocks.generation.options import check_defaults, draws
from blocks.generation.prompts import tokenizer_size, vocabulary_size
from blocks.lora import LoraMixin
from blocks.quantized_head import logits_of
from blocks.token_model import TokenModel
from blocks.training.mixin import TrainingMixin


class LanguageModel(
    FitMixin, TokenModel, TrainingMixin, GenerationMixin, CheckpointMixin, LoraMixin
):
    """Training, generation and presets of a model that continues tokens.

    A subclass says what it takes and which model is called on tokens: `_symbolic_inputs`,
    `encoder`, `decoder`, `compute_hidden_states`.
    """

    def __init__(
        self,
        backbone: Any,
        preprocessor: Any = None,
        *,
        generation_options: dict[str, Any] | None = None,
        generation_sizes: GenerationSizes | None = None,
        **kwargs: Any,
    ) -> None:
        self.check_rest(kwargs)
        self.generation_options = check_defaults(generation_options or {})
        inputs = self._symbolic_inputs(backbone)
        if type(self).compute_logits is LanguageModel.compute_logits:
            token_embedding(backbone)
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.prompt_inputs = getattr(backbone, "prompt_inputs", ())
        # === Functional model ===
        outputs = self.compute_logits(self.compute_hidden_states(inputs))
        if len(getattr(outputs, "shape", ())) != 3:
            raise TypeError(
                f"`{type(self).__name__}.compute_logits` must return logits of shape "
                "(batch, length, vocabulary_size). It returned "
                f"{describe(outputs)}"
            )
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)  # type: ignore[call-arg]
        self.generation_sizes = generation_sizes or GenerationSizes()
        size, known = tokenizer_size(preprocessor), vocabulary_size(self)
        if size is not None and known is not None and size > known:
            raise ValueError(
                f"The `preprocessor`'s tokenizer has {size} tokens, which is more than "
                f"the model's vocabulary of {known}: they don't belong together."
            )

    def _symbolic_inputs(self, backbone: Any) -> dict[str, Any]:
        """Returns the inputs of a model with this backbone, which is checked."""
        raise NotImplementedError

    @property
    def encoder(self) -> Any:
        """Returns the model that reads sources, or `None`."""
        raise NotImplementedError

    @property
    def decoder(self) -> Any:
        """Returns the model that is called on tokens with a KV cache."""
        raise NotImplementedError

    def compute_hidden_states(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """Returns what the backbone makes of the model's inputs, before the logits."""
        raise NotImplementedError

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
        config = super().get_config()  # type: ignore[misc]
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

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Quantizes the weights, as `keras.Model.quantize`."""
        if self.preprocessor is not None:
            # Keras asks for layers that are built: a tokenizer is by its first text.
            self.preprocessor.generate_preprocess(["a"])
        super().quantize(*args, **kwargs)  # type: ignore[misc]
