"""`CustomBackbone`: hooks by depth, other ways through the blocks, a head of its own."""

import keras
import numpy as np
import pytest

from attention import MultiHeadAttention, RotaryAttention, call_sites
from blocks import CausalLM, CustomBackbone, CustomDecoder, GatedFeedForward
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

# === Hooks ===


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


@keras.saving.register_keras_serializable(package=PACKAGE)
class SharedBlockBackbone(CustomBackbone):
    """ALBERT: one block at every depth."""

    def create_decoder(self, layer_index):
        if layer_index == 0:
            self.shared = super().create_decoder(0)
        return self.shared


def test_one_block_at_every_depth(tmp_path):
    backbone = make_backbone(SharedBlockBackbone, num_layers=3)
    single = make_backbone(num_layers=1)
    assert backbone.count_params() == single.count_params()
    # Each depth has a cache of its own: with one, the others would be lost.
    assert len(call_sites(backbone)) == 1 + 3
    lm = make_lm(backbone)
    check_generation(lm)
    lm.save(tmp_path / "shared.keras")
    restored = keras.models.load_model(tmp_path / "shared.keras")
    x = prompts(RAGGED)
    np.testing.assert_allclose(to_numpy(restored(x)), to_numpy(lm(x)), atol=1e-5)


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
class SkippingBackbone(CustomBackbone):
    """Values flow between blocks: the embeddings, and the first block's outputs."""

    def transform(self, x, padding_mask):
        first = None
        embedded = x
        for decoder in self.transformer_layers:
            x = decoder(x, padding_mask=padding_mask)
            first = x if first is None else first
            x = x + 0.5 * first - 0.25 * embedded
        return x


def test_values_that_flow_between_blocks():
    lm = make_lm(make_backbone(SkippingBackbone, num_layers=3))
    plain = make_lm(make_backbone(num_layers=3))
    x = prompts(RAGGED)
    assert np.abs(to_numpy(lm(x)) - to_numpy(plain(x))).max() > 0.1
    check_generation(lm)


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


def test_the_names_of_weights_are_the_same_in_every_model():
    first, second = make_backbone(), make_backbone()
    assert [w.path for w in first.weights] == [w.path for w in second.weights]
    assert len({w.path for w in first.weights}) == len(first.weights)


# === The head, and clones ===


class CappedLM(CausalLM):
    """A head of its own: the most likely token of the plain one is forbidden."""

    def compute_logits(self, hidden_states):
        logits = super().compute_logits(hidden_states)
        return keras.ops.negative(logits)


def test_a_head_of_its_own():
    backbone = make_backbone(num_layers=1)
    lm = CappedLM(backbone)
    lm.compile(sampler="greedy")
    check_generation(lm)
    x = prompts(RAGGED)
    np.testing.assert_allclose(
        to_numpy(lm(x)), -to_numpy(make_lm(backbone)(x)), atol=1e-5
    )


CLONED = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "max_sequence_length": 16,
}


def test_a_clone_is_made_by_the_same_hooks():
    for backbone in (AlternatingBackbone(**CLONED), CustomBackbone(**CLONED)):
        clone = keras.models.clone_model(backbone)
        shapes = [[tuple(w.shape) for w in x.weights] for x in (backbone, clone)]
        assert shapes[0] == shapes[1]
        clone.set_weights(backbone.get_weights())
        x = prompts(RAGGED)
        np.testing.assert_allclose(to_numpy(clone(x)), to_numpy(backbone(x)), atol=1e-6)
