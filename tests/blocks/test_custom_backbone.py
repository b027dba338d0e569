"""`CustomBackbone`: its hooks, configuration and clones."""

import keras
import numpy as np
import pytest

from attention import MultiHeadAttention, RotaryAttention
from attention.testing import check_cached_model
from blocks import (
    CausalLM,
    CustomBackbone,
    CustomDecoder,
    GatedFeedForward,
    gelu_approximate,
)
from tests.models import (
    PACKAGE,
    RAGGED,
    VOCABULARY_SIZE,
    check_generation,
    make_backbone,
    make_lm,
    prompts,
    rows_of,
    to_numpy,
)


@keras.saving.register_keras_serializable(package=PACKAGE)
class AlternatingBackbone(CustomBackbone):
    """Each hook is given the depth."""

    def create_attention_layer(self, inputs_shape, layer_index):
        if layer_index % 2:
            return RotaryAttention(self.num_heads, 2)
        return MultiHeadAttention(self.num_heads)

    def create_ffn(self, inputs_shape, layer_index):
        if layer_index == 0:
            return GatedFeedForward(self.intermediate_dim)
        return super().create_ffn(inputs_shape, layer_index)

    def create_norm(self, inputs_shape, layer_index):
        assert tuple(inputs_shape)[-1] == self.hidden_dim
        epsilon = 10.0 ** -(layer_index + 3)
        return keras.layers.LayerNormalization(epsilon=epsilon)


def test_hooks_know_the_depth():
    backbone = make_backbone(AlternatingBackbone)
    first, second = backbone.transformer_layers
    assert type(first.self_attention) is MultiHeadAttention
    assert type(second.self_attention) is RotaryAttention
    assert type(first.ffn) is GatedFeedForward
    assert type(second.ffn) is not GatedFeedForward
    assert [
        first.attention_norm.epsilon,
        second.ffn_norm.epsilon,
        backbone.layer_norm.epsilon,
    ] == [1e-3, 1e-4, 1e-5]
    check_generation(make_lm(backbone))


class RotaryDecoder(CustomDecoder):
    def create_attention_layer(self, inputs_shape):
        return RotaryAttention(self.num_heads, self.num_key_value_heads)


@keras.saving.register_keras_serializable(package=PACKAGE)
class OtherBlocksBackbone(CustomBackbone):
    def create_decoder(self, layer_index):
        return RotaryDecoder(self.intermediate_dim, self.num_heads)

    def create_final_norm(self):
        return keras.layers.RMSNormalization()


def test_other_blocks():
    backbone = make_backbone(OtherBlocksBackbone, learned_positions=False)
    assert backbone.position_embedding is None
    assert [type(x) for x in backbone.transformer_layers] == [RotaryDecoder] * 2
    assert type(backbone.layer_norm) is keras.layers.RMSNormalization
    assert all(
        w.path.startswith(("token_embedding", "transformer_layer_", "layer_norm"))
        for w in backbone.weights
        if "seed" not in w.path
    )


class GemmaDecoder(CustomDecoder):
    """Four norms; the window and the rotary base depend on the depth."""

    norm_names = ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm")

    def create_attention_layer(self, inputs_shape):
        window, base = (4, 1e4) if self.layer_index % 2 == 0 else (None, 1e6)
        return RotaryAttention(
            self.num_heads,
            self.num_key_value_heads,
            max_wavelength=base,
            window=window,
        )

    def create_norm(self, inputs_shape):
        return keras.layers.RMSNormalization(epsilon=1e-6)

    def transform(self, x, padding_mask=None):
        h = self.self_attention(self.attention_norm(x), padding_mask=padding_mask)
        x = x + self.attention_post_norm(h)
        return x + self.ffn_post_norm(self.ffn(self.ffn_norm(x)))


@keras.saving.register_keras_serializable(package=PACKAGE)
class GemmaBackbone(CustomBackbone):
    decoder_class = GemmaDecoder

    def create_ffn(self, inputs_shape, layer_index):
        return GatedFeedForward(self.intermediate_dim, activation=gelu_approximate)


GEMMA = {"cls": GemmaBackbone, "num_key_value_heads": 2, "learned_positions": False}


def test_a_decoder_class(tmp_path):
    backbone = make_backbone(**GEMMA)
    for i, block in enumerate(backbone.transformer_layers):
        layer = block.self_attention
        assert block.layer_index == i
        assert (layer.num_heads, layer.num_key_value_heads) == (4, 2)
        assert layer.window == (4, None)[i]
        assert layer.position.max_wavelength == (1e4, 1e6)[i]
        assert type(block.ffn) is GatedFeedForward
        assert f"transformer_layer_{i}/ffn_post_norm/scale" in [
            weight.path for weight in block.weights
        ]
    # It follows the norms of the block, which the backbone's hook doesn't make.
    assert type(backbone.layer_norm) is keras.layers.RMSNormalization
    lm = make_lm(backbone)
    lm.save_to_preset(str(tmp_path / "preset"))
    lm.save(tmp_path / "lm.keras")
    x = prompts(RAGGED)
    for restored in (
        CausalLM.from_preset(str(tmp_path / "preset")),
        keras.models.load_model(tmp_path / "lm.keras"),
    ):
        np.testing.assert_allclose(to_numpy(restored(x)), to_numpy(lm(x)), atol=1e-5)


@pytest.mark.slow
def test_a_decoder_class_keeps_the_contract():
    check_cached_model(lambda: make_backbone(**GEMMA), max_length=9)


@keras.saving.register_keras_serializable(package=PACKAGE)
class ScaledEmbedding(keras.layers.ReversibleEmbedding):
    """Gemma's: embeddings are scaled on the way in."""

    def call(self, inputs, reverse=False):
        outputs = super().call(inputs, reverse=reverse)
        return outputs if reverse else outputs * self.output_dim**0.5


@keras.saving.register_keras_serializable(package=PACKAGE)
class ScaledEmbeddingBackbone(CustomBackbone):
    def create_embedding(self):
        return ScaledEmbedding(self.vocabulary_size, self.hidden_dim)

    def create_position_embedding(self):
        return None

    def create_attention_layer(self, inputs_shape, layer_index):
        return RotaryAttention(self.num_heads)


def test_embedding_hooks():
    backbone = make_backbone(ScaledEmbeddingBackbone)
    assert type(backbone.token_embedding) is ScaledEmbedding
    assert backbone.position_embedding is None
    embeddings = to_numpy(backbone.token_embedding.embeddings)
    np.testing.assert_allclose(
        to_numpy(backbone.token_embedding(np.array([[3]])))[0, 0],
        embeddings[3] * 4.0,
        rtol=1e-5,
    )
    check_generation(make_lm(backbone))
    # Without learned positions there is no limit of `max_sequence_length`.
    lm = make_lm(backbone)
    row = [t % VOCABULARY_SIZE for t in range(70)]
    outputs = lm.generate(prompts([row]), stop_token_ids=None, max_new_tokens=3)
    assert len(rows_of(outputs)[0]) == 73 > backbone.max_sequence_length


@keras.saving.register_keras_serializable(package=PACKAGE)
class ScaleBackbone(CustomBackbone):
    """An argument of its own, which its hook reads."""

    def __init__(self, *args, scale=1.0, **kwargs):
        self.scale = scale
        super().__init__(*args, **kwargs)

    def create_attention_layer(self, inputs_shape, layer_index):
        return MultiHeadAttention(self.num_heads, scale=self.scale)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


class LateBackbone(ScaleBackbone):
    def __init__(self, *args, scale=1.0, **kwargs):
        CustomBackbone.__init__(self, *args, **kwargs)
        self.scale = scale


def test_an_argument_of_a_subclass():
    backbone = make_backbone(ScaleBackbone, scale=0.25, dropout=0.1, name="scaled")
    assert backbone.transformer_layers[1].self_attention.scale == 0.25
    config = backbone.get_config()
    restored = ScaleBackbone.from_config(config)
    assert restored.get_config() == config
    assert restored.scale == 0.25
    assert restored.name == "scaled"


def test_an_argument_that_is_set_too_late():
    with pytest.raises(AttributeError) as error:
        make_backbone(LateBackbone, scale=0.25)
    assert "`LateBackbone.create_attention_layer` read `self.scale`" in str(error.value)
    assert "before `super().__init__(...)`" in str(error.value)


def test_config_round_trip():
    backbone = CustomBackbone(
        vocabulary_size=50,
        num_layers=1,
        num_heads=4,
        hidden_dim=8,
        intermediate_dim=16,
        num_key_value_heads=2,
        max_sequence_length=32,
        dropout=0.2,
        layer_norm_epsilon=1e-3,
        learned_positions=False,
        tie_word_embeddings=False,
        dtype="mixed_bfloat16",
        trainable=False,
    )
    config = backbone.get_config()
    restored = CustomBackbone.from_config(config)
    assert restored.get_config() == config
    assert restored.trainable is False
    assert restored.transformer_layers[0].compute_dtype == "bfloat16"
    assert restored.transformer_layers[0].self_attention.num_key_value_heads == 2


CLONED = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 16,
}


def test_a_clone_is_made_by_the_same_hooks():
    gemma = GemmaBackbone(**CLONED)
    # Its blocks are cloned by their own `get_config`.
    headed = keras.Model(gemma.input, keras.layers.Dense(3)(gemma.output))
    for model in (AlternatingBackbone(**CLONED), CustomBackbone(**CLONED), headed):
        clone = keras.models.clone_model(model)
        shapes = [[tuple(w.shape) for w in x.weights] for x in (model, clone)]
        assert shapes[0] == shapes[1]
        clone.set_weights(model.get_weights())
        x = prompts(RAGGED)
        np.testing.assert_allclose(to_numpy(clone(x)), to_numpy(model(x)), atol=1e-6)
