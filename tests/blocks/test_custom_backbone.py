"""`CustomBackbone`: its hooks, configuration and clones."""

import keras
import numpy as np
import pytest

from attention import MultiHeadAttention, RotaryAttention
from blocks import (
    CausalLM,
    CustomBackbone,
    CustomDecoder,
    GatedFeedForward,
    gelu_approximate,
)
from tests.helpers import assert_close, raises, to_numpy
from tests.models import (
    PACKAGE,
    RAGGED,
    VOCABULARY_SIZE,
    check_generation,
    generated,
    make_backbone,
    make_lm,
    prompts,
)

pytestmark = pytest.mark.same_everywhere


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
    norms = (first.attention_norm, second.ffn_norm, backbone.layer_norm)
    assert [norm.epsilon for norm in norms] == [1e-3, 1e-4, 1e-5]
    check_generation(make_lm(backbone))


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


def test_a_decoder_class(tmp_path):
    backbone = make_backbone(
        GemmaBackbone, num_key_value_heads=2, learned_positions=False
    )
    for i, block in enumerate(backbone.transformer_layers):
        layer = block.self_attention
        assert block.layer_index == i
        assert (layer.num_heads, layer.num_key_value_heads) == (4, 2)
        assert layer.window == (4, None)[i]
        assert layer.position.max_wavelength == (1e4, 1e6)[i]
        assert type(block.ffn) is GatedFeedForward
        paths = [weight.path for weight in block.weights]
        assert f"transformer_layer_{i}/ffn_post_norm/scale" in paths
    # It follows the norms of the block, which the backbone's hook doesn't make.
    assert type(backbone.layer_norm) is keras.layers.RMSNormalization
    lm = make_lm(backbone)
    check_generation(lm)
    lm.save_to_preset(str(tmp_path / "preset"))
    lm.save(tmp_path / "lm.keras")
    x = prompts(RAGGED)
    for restored in (
        CausalLM.from_preset(str(tmp_path / "preset")),
        keras.models.load_model(tmp_path / "lm.keras"),
    ):
        assert_close(restored(x), lm(x))


class ScaledEmbedding(keras.layers.ReversibleEmbedding):
    """Gemma's: embeddings are scaled on the way in."""

    def call(self, inputs, reverse=False):
        outputs = super().call(inputs, reverse=reverse)
        return outputs if reverse else outputs * self.output_dim**0.5


class ScaledEmbeddingBackbone(CustomBackbone):
    def create_embedding(self):
        return ScaledEmbedding(self.vocabulary_size, self.hidden_dim)

    def create_position_embedding(self):
        return None

    def create_attention_layer(self, inputs_shape, layer_index):
        return RotaryAttention(self.num_heads)


@pytest.mark.slow
def test_embedding_hooks():
    backbone = make_backbone(ScaledEmbeddingBackbone)
    assert type(backbone.token_embedding) is ScaledEmbedding
    assert backbone.position_embedding is None
    embeddings = to_numpy(backbone.token_embedding.embeddings)
    found = backbone.token_embedding(np.array([[3]]))
    assert_close(found, 4.0 * embeddings[None, 3:4])
    lm = make_lm(backbone)
    check_generation(lm)
    # Without learned positions there is no limit of `max_sequence_length`.
    row = np.arange(70) % VOCABULARY_SIZE
    (found,) = generated(lm, [row], max_new_tokens=3)
    assert len(found) == 73 > backbone.max_sequence_length


def test_an_argument_that_is_set_too_late():
    class LateBackbone(CustomBackbone):
        def __init__(self, *args, scale=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = scale

        def create_attention_layer(self, inputs_shape, layer_index):
            return MultiHeadAttention(self.num_heads, scale=self.scale)

    read = "`LateBackbone.create_attention_layer` read `self.scale`"
    with raises(AttributeError, read, "before `super().__init__(...)`"):
        make_backbone(LateBackbone, scale=0.25)


def test_config_round_trip():
    backbone = make_backbone(
        num_key_value_heads=2,
        dropout=0.2,
        layer_norm_epsilon=1e-3,
        learned_positions=False,
        tie_word_embeddings=False,
        dtype="mixed_bfloat16",
        trainable=False,
        name="mine",
    )
    config = backbone.get_config()
    restored = CustomBackbone.from_config(config)
    assert restored.get_config() == config
    assert (restored.name, restored.trainable) == ("mine", False)
    assert restored.transformer_layers[0].compute_dtype == "bfloat16"
    assert restored.transformer_layers[0].self_attention.num_key_value_heads == 2


def test_a_clone_is_made_by_the_same_hooks():
    gemma = make_backbone(GemmaBackbone)
    # Its blocks are cloned by their own `get_config`.
    headed = keras.Model(gemma.input, keras.layers.Dense(3)(gemma.output))
    for model in (make_backbone(AlternatingBackbone), make_backbone(), headed):
        clone = keras.models.clone_model(model)
        shapes = [[tuple(w.shape) for w in x.weights] for x in (model, clone)]
        assert shapes[0] == shapes[1]
        clone.set_weights(model.get_weights())
        x = prompts(RAGGED)
        assert_close(clone(x), model(x))


def test_each_block_with_a_way_of_its_own_is_traced():
    """Also the second of its kind: its sublayers are built, and it may return more."""

    class Mixing(CustomDecoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.mix = keras.layers.Dense(16)

        def transform(self, x, padding_mask=None, training=None):
            attended = self.self_attention(self.attention_norm(x))
            x = super().transform(x + self.mix(attended), padding_mask)
            return (x, attended) if self.layer_index else x

    class Both(CustomBackbone):
        decoder_class = Mixing

        def transform(self, x, padding_mask):
            first, second = self.transformer_layers
            x, attended = second(first(x, padding_mask=padding_mask))
            return x + attended

    counts = set()
    for _ in range(2):
        backbone = make_backbone(Both)
        assert all(x.mix.built for x in backbone.transformer_layers)
        counts.add(backbone.count_params())
    assert len(counts) == 1
