"""The encoder-decoder backbone whose parts come from hooks."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops

from attention import CachedLayer, GroupedQueryAttention, PositionEmbedding
from attention.contract import Shape, Tensor, check_optional_positive_int
from blocks.custom_backbone import CustomBackbone
from blocks.custom_encoder import CustomEncoder
from blocks.generation.backbone_inputs import token_inputs
from blocks.hooks import name_layer, run_hook

# What the encoder returns, and the decoder takes.
ENCODED = ("encoder_sequence", "encoder_padding_mask")


@keras.saving.register_keras_serializable(package="keras_transformer_blocks")
class CustomSeq2SeqBackbone(CustomBackbone):
    """An encoder-decoder backbone with a hook for each of its parts.

    ```
    source ─► embed_source ─► encoder_layers ─► encoder_norm ──────┐
    target ─► embed ────────► transformer_layers, which attend to it ─► layer_norm ─►
    ```

    By default it is the architecture of the original transformer, with norms before the
    layers and learned positions. All hooks of `blocks.CustomBackbone` are here, too:
    `create_ffn` and `create_norm` make the parts of both sides, and
    `create_attention_layer` is told for which it makes one. `encoder_class` and
    `create_encoder` are for the blocks of the encoder what `decoder_class` and
    `create_decoder` are for those of the decoder.

    Sources are tokens; or anything that overridden `source_inputs` and `embed_source`
    make vectors of, such as spectrograms or patches of images.

    Attributes:
        encoder_class: subclass of `blocks.CustomEncoder`. The class of its blocks.
        encoder: a `keras.Model`: from the source's inputs to a dict of
            `encoder_sequence` and `encoder_padding_mask`.
        decoder: a `keras.Model`: from a dict of `token_ids`, `padding_mask` and what
            the encoder returns to hidden states. With a cache, what the encoder
            returns is given once, and is `None` from then on.

    Weights have the paths of `CustomBackbone`, `transformer_layer_{i}/cross_attention`
    and `cross_attention_norm`, and those of `encoder_layer_{i}`, `encoder_norm` and
    `encoder_position_embedding`.

    Args:
        vocabulary_size: int. The number of tokens, of source and target.
        num_layers: int. The number of blocks of the decoder.
        num_heads: int. The number of query heads of each block.
        hidden_dim: int. The width.
        intermediate_dim: int. The width inside the feed-forward layers.
        num_encoder_layers: int or `None`, which means `num_layers`.
        max_source_length: int or `None`, which means `max_sequence_length`: the number of
            learned positions of sources.
        **kwargs: as for `blocks.CustomBackbone`.

    Call arguments:
        inputs: a dict of `encoder_token_ids`, `encoder_padding_mask`,
            `decoder_token_ids` and `decoder_padding_mask`, integer tensors of shapes
            `(batch, source_length)` and `(batch, length)`; true for the real tokens,
            padded on the right.

    Returns:
        A dict of `encoder_sequence_output`, `(batch, source_length, hidden_dim)`, and
        `decoder_sequence_output`, `(batch, length, hidden_dim)`.

    Raises:
        TypeError: if a hook returns something that is no fitting layer.
        ValueError: if an argument is out of range, or heads do not divide.

    Example:

    >>> from keras import ops
    >>> from blocks import CustomSeq2SeqBackbone
    >>> backbone = CustomSeq2SeqBackbone(
    ...     vocabulary_size=50,
    ...     num_layers=1,
    ...     num_heads=2,
    ...     hidden_dim=16,
    ...     intermediate_dim=32,
    ...     max_sequence_length=32,
    ... )
    >>> source, target = ops.ones((1, 7), "int32"), ops.ones((1, 3), "int32")
    >>> encoded = backbone.encoder(
    ...     {"encoder_token_ids": source, "encoder_padding_mask": source}
    ... )
    >>> inputs = {"token_ids": target, "padding_mask": target}
    >>> hidden = backbone.decoder({**inputs, **encoded})
    >>> hidden.shape == (1, 3, 16)
    True

    Reference:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    encoder_class: type[CustomEncoder] = CustomEncoder

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        num_encoder_layers: int | None = None,
        max_source_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        count = check_optional_positive_int("num_encoder_layers", num_encoder_layers)
        self.num_encoder_layers = count or num_layers
        self.max_source_length = check_optional_positive_int(
            "max_source_length", max_source_length
        )
        sizes = (num_heads, hidden_dim, intermediate_dim)
        super().__init__(vocabulary_size, num_layers, *sizes, **kwargs)

    def _create_layers(self) -> None:
        super()._create_layers()
        self.encoder_position_embedding = run_hook(
            self, "create_encoder_position_embedding"
        )
        self.encoder_layers: list[keras.layers.Layer] = []
        self._create_blocks("create_encoder", "encoder_layer", self.num_encoder_layers)
        self.encoder_norm = run_hook(self, "create_encoder_norm")
        name_layer(self.encoder_norm, "encoder_norm")

    def _connect(self) -> tuple[Any, Any]:
        # === The encoder ===
        source = self.source_inputs()
        x, mask = self.embed_source(source)
        encoded = self.encoder_norm(self.transform_source(x, mask))
        self.encoder = keras.Model(
            source, dict(zip(ENCODED, (encoded, mask))), name="encoder"
        )
        # === The decoder ===
        inputs = token_inputs()
        # From the second call with a cache on they are in the cache.
        for name, x in zip(ENCODED, (encoded, mask)):
            like = {"dtype": x.dtype, "name": name, "optional": True}
            inputs[name] = keras.Input(tuple(x.shape)[1:], **like)
        x = self.embed(inputs["token_ids"], inputs["padding_mask"])
        x = self.transform(x, inputs["padding_mask"], *(inputs[y] for y in ENCODED))
        self.decoder = keras.Model(inputs, self.layer_norm(x), name="decoder")
        # === Both ===
        target = token_inputs("decoder_")
        given = {name.removeprefix("decoder_"): x for name, x in target.items()}
        states = self.encoder(source)
        outputs = {
            "encoder_sequence_output": states["encoder_sequence"],
            "decoder_sequence_output": self.decoder({**given, **states}),
        }
        return {**source, **target}, outputs

    def source_inputs(self) -> dict[str, Any]:
        """Hook: returns the symbolic inputs of the encoder, by their names.

        By default they are `encoder_token_ids` and `encoder_padding_mask`. An input whose
        name ends with `padding_mask` marks what is real, padded on the right.
        """
        return token_inputs("encoder_")

    def embed_source(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Hook: makes vectors of a source.

        Args:
            inputs: what `source_inputs` returns.

        Returns:
            A tensor of shape `(batch, source_length, hidden_dim)` and the mask of what is
            real, `(batch, source_length)`.
        """
        mask = inputs["encoder_padding_mask"]
        x = self.embed(inputs["encoder_token_ids"], mask, "encoder_")
        return x, ops.cast(mask, "bool")

    def transform_source(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """Runs the blocks of the encoder, which are in `self.encoder_layers`.

        Its arguments and what it returns are those of `transform`.
        """
        for encoder in self.encoder_layers:
            x = encoder(x, padding_mask=padding_mask)
        return x

    def transform(  # type: ignore[override]
        self,
        x: Tensor,
        padding_mask: Tensor,
        encoder_sequence: Tensor,
        encoder_padding_mask: Tensor,
    ) -> Tensor:
        """Runs the blocks of the decoder, which are in `self.transformer_layers`.

        Args:
            x: tensor of shape `(batch, length, hidden_dim)`.
            padding_mask: integer tensor of shape `(batch, length)`.
            encoder_sequence: tensor of shape `(batch, source_length, hidden_dim)`; pass
                it on as it is, as it is `None` once it is in the cache.
            encoder_padding_mask: bool tensor of shape `(batch, source_length)`, too.

        Returns:
            A tensor of the shape of `x`.
        """
        for decoder in self.transformer_layers:
            x = decoder(
                x,
                padding_mask=padding_mask,
                encoder_sequence=encoder_sequence,
                encoder_padding_mask=encoder_padding_mask,
            )
        return x

    def create_encoder(self, layer_index: int) -> keras.layers.Layer:
        """Hook: makes a block of the encoder; by default of the class `encoder_class`.

        `layer_index` is its depth, from 0.
        """
        run = functools.partial(_run_hook, self, layer_index)
        return self._make_block("encoder", CustomEncoder, run)

    def create_attention_layer(
        self, inputs_shape: Shape, layer_index: int, causal: bool = True
    ) -> CachedLayer:
        """Hook: makes the self-attention layer of a block.

        Args:
            inputs_shape: tuple. The shape of the block's inputs.
            layer_index: int. The block's depth, from 0.
            causal: bool. Whether the block is one of the decoder, whose tokens see no
                later ones; in one of the encoder all see each other.

        Returns:
            An `attention.CachedLayer`.
        """
        return GroupedQueryAttention(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads or self.num_heads,
            dropout=self.dropout,
            causal=causal,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def create_encoder_position_embedding(self) -> CachedLayer | None:
        """Hook: makes the layer whose outputs are added to the embeddings of sources.

        Returns:
            An `attention.CachedLayer` made with `sequence="source"`, or `None`.
        """
        if not self.learned_positions:
            return None
        return PositionEmbedding(
            self.max_source_length or self.max_sequence_length,
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            sequence="source",
        )

    def create_encoder_norm(self) -> keras.layers.Layer:
        """Hook: makes the normalization after the last block of the encoder."""
        if not self.normalize_first:
            return keras.layers.Identity(name="encoder_norm")
        shape = (None, None, self.hidden_dim)
        return run_hook(self, "create_norm", shape, self.num_encoder_layers)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["num_encoder_layers"] = self.num_encoder_layers
        config["max_source_length"] = self.max_source_length
        return config


def _run_hook(
    backbone: CustomSeq2SeqBackbone, layer_index: int, name: str, inputs_shape: Shape
) -> keras.layers.Layer:
    # Of a block of the encoder.
    options = (False,) if name == "create_attention_layer" else ()
    return run_hook(backbone, name, inputs_shape, layer_index, *options)
