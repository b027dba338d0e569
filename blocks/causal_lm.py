"""The causal language model, written once for every backbone."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub

from attention.contract import describe
from blocks.embedded_prompts import read_embeddings
from blocks.generation.backbone_inputs import (
    backbone_inputs,
    check_backbone,
    task_inputs,
)
from blocks.generation.sources import Sources
from blocks.language_model import LanguageModel
from blocks.preprocessor import CausalLMPreprocessor
from blocks.serving import Server


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CausalLM(LanguageModel, keras_hub.models.CausalLM):
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
        TypeError: if `backbone` is no functional model of tokens, there is no way from
            its outputs to logits, or an argument is not known.
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
    # What is made of a published tokenizer.
    preprocessor_class: Any = CausalLMPreprocessor

    def _symbolic_inputs(self, backbone: Any) -> dict[str, Any]:
        check_backbone(backbone)
        return task_inputs(backbone)

    @property
    def encoder(self) -> Any:
        """Returns `None`: there is no source to read."""
        return None

    @property
    def decoder(self) -> Any:
        """Returns the model that is called on tokens with a KV cache."""
        return self.backbone

    def compute_hidden_states(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        known = backbone_inputs(self.backbone, inputs, inputs["padding_mask"])
        return self.backbone(known, **kwargs)

    def split_inputs(self, inputs: Any) -> tuple[Sources | None, Any]:
        names = self.prompt_inputs
        if not names or not isinstance(inputs, dict) or names[0] not in inputs:
            return None, inputs
        return read_embeddings(inputs, self.backbone.hidden_dim)

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
