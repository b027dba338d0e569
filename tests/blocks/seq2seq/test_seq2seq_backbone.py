"""Encoder-decoder backbones: one forward pass, whose source is read once."""

import keras
import numpy as np
import pytest

from attention import (
    RotaryAttention,
    T5Attention,
    call_with_cache,
    create_cache,
    write_source,
)
from attention.testing import check_cached_model
from blocks import CustomDecoder, CustomEncoder, CustomSeq2SeqBackbone
from tests.helpers import assert_close, raises, randomize, to_numpy

pytestmark = pytest.mark.same_everywhere

PACKAGE = "tests"
SIZES = {
    "vocabulary_size": 40,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "max_sequence_length": 12,
    "max_source_length": 7,
}
LENGTHS, TARGETS = np.array([7, 3, 5]), np.array([9, 9, 4])


@keras.saving.register_keras_serializable(package=PACKAGE)
class SharedBias(CustomSeq2SeqBackbone):
    """T5's: one table of biases for all layers of a side."""

    def __init__(self, *args, **kwargs):
        self.positions = {}
        super().__init__(*args, learned_positions=False, **kwargs)

    def create_attention_layer(self, inputs_shape, layer_index, causal=True):
        shared = self.positions.get(causal)
        made = T5Attention(
            4, num_buckets=8, max_distance=10, causal=causal, position=shared
        )
        self.positions[causal] = made.position
        return made

    def create_norm(self, inputs_shape, layer_index):
        return keras.layers.RMSNormalization()

    def get_config(self):
        config = super().get_config()
        del config["learned_positions"]
        return config


@keras.saving.register_keras_serializable(package=PACKAGE)
class Windowed(CustomSeq2SeqBackbone):
    """Rotary on both sides, and windows in the encoder."""

    def create_attention_layer(self, inputs_shape, layer_index, causal=True):
        window = None if causal else 3
        return RotaryAttention(4, 2, causal=causal, window=window)

    def create_position_embedding(self):
        return None

    create_encoder_position_embedding = create_position_embedding


KINDS = {"stock": CustomSeq2SeqBackbone, "t5": SharedBias, "windowed": Windowed}


def make(kind="stock", **kwargs):
    return randomize(KINDS[kind](**{**SIZES, **kwargs}))


def arrays():
    rng = np.random.default_rng(0)
    parts = {}
    for side, lengths in (("encoder", LENGTHS), ("decoder", TARGETS)):
        width = lengths.max()
        tokens = rng.integers(1, 40, (3, width)).astype("int32")
        mask = (np.arange(width) < lengths[:, None]).astype("int32")
        parts |= {f"{side}_token_ids": tokens, f"{side}_padding_mask": mask}
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_it_is_alone(kind):
    backbone, x = make(kind), arrays()
    names = ("encoder_sequence_output", "decoder_sequence_output")
    whole = backbone(x)
    for row, lengths in enumerate(zip(LENGTHS, TARGETS)):
        part = {
            name: value[row : row + 1, : lengths["decoder" in name]]
            for name, value in x.items()
        }
        alone = backbone(part)
        for name, length in zip(names, lengths):
            assert_close(whole[name][row, :length], alone[name][0])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_a_source_that_is_given_once(kind):
    backbone = make(kind)
    x = {name: keras.ops.convert_to_tensor(v) for name, v in arrays().items()}
    expected = to_numpy(backbone(x)["decoder_sequence_output"])
    encoded = backbone.encoder({name: v for name, v in x.items() if "encoder" in name})
    cache = create_cache(backbone.decoder, 3, 12, source_length=7)
    cache = write_source(backbone.decoder, encoded, cache)
    with raises(ValueError, "`sources`", "encoder_sequences", "padding_mask"):
        write_source(backbone.decoder, {"encoder_sequences": 0}, cache)
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        inputs = {
            name: x[f"decoder_{name}"][:, start:stop]
            for name in ("token_ids", "padding_mask")
        }
        mask = inputs["padding_mask"]
        inputs |= dict.fromkeys(encoded)
        found, cache = call_with_cache(backbone.decoder, inputs, cache, start, mask)
        real = to_numpy(mask)[..., None]
        assert_close(to_numpy(found) * real, expected[:, start:stop] * real)


def test_hooks_of_both_sides():
    class Encoder(CustomEncoder):
        norm_names = ("attention_norm", "extra_norm", "ffn_norm")

    class Decoder(CustomDecoder):
        def create_norm(self, inputs_shape):
            return keras.layers.RMSNormalization()

    class Both(CustomSeq2SeqBackbone):
        encoder_class, decoder_class = Encoder, Decoder

        def create_cross_attention_layer(self, inputs_shape, layer_index):
            self.crossed = layer_index
            return super().create_cross_attention_layer(inputs_shape, layer_index)

    backbone = Both(**{**SIZES, "num_encoder_layers": 1})
    assert len(backbone.encoder_layers) == 1 and backbone.crossed == 1
    paths = {weight.path for weight in backbone.weights}
    assert "encoder_layer_0/extra_norm/gamma" in paths
    assert "transformer_layer_1/cross_attention/query/kernel" in paths
    assert "transformer_layer_1/cross_attention_norm/scale" in paths
    assert "encoder_position_embedding/embeddings" in paths
    assert len(paths) == len(backbone.weights)
    Both.encoder_class = CustomDecoder
    with raises(TypeError, "`Both.encoder_class`"):
        Both(**SIZES)


@pytest.mark.parametrize("kind", KINDS)
def test_presets(kind, tmp_path):
    backbone, x = make(kind), arrays()
    backbone.save_to_preset(str(tmp_path / "preset"))
    restored = KINDS[kind].from_preset(str(tmp_path / "preset"))
    assert restored.max_source_length == 7
    found, expected = (y(x)["decoder_sequence_output"] for y in (restored, backbone))
    assert_close(found, expected)


def test_features_as_sources():
    class Speech(CustomSeq2SeqBackbone):
        def source_inputs(self):
            return {"features": keras.Input((None, 5), name="features")}

        def embed_source(self, inputs):
            x = keras.layers.Conv1D(16, 3, strides=2, padding="same", name="stem")(
                inputs["features"]
            )
            return x, keras.ops.ones_like(x[..., 0], dtype="bool")

        def create_encoder_position_embedding(self):
            return None

    backbone, x = randomize(Speech(**SIZES)), arrays()
    features = np.random.default_rng(0).normal(size=(3, 8, 5)).astype("float32")
    x = {"features": features, **{k: v for k, v in x.items() if "decoder" in k}}
    outputs = backbone(x)
    assert outputs["encoder_sequence_output"].shape == (3, 4, 16)
    changed = backbone({**x, "features": features * 2})
    moved = outputs["decoder_sequence_output"] - changed["decoder_sequence_output"]
    assert np.abs(to_numpy(moved)).max() > 1e-3


@pytest.mark.slow
def test_the_kit_takes_a_source():
    """A source is given whole at each call: it is no part of the sequence."""
    rng = np.random.default_rng(0)
    source = {
        "encoder_sequence": rng.normal(size=(1, 5, 16)).astype("float32"),
        "encoder_padding_mask": np.array([[1, 1, 1, 1, 0]], "bool"),
    }
    checks = ["prefill_and_steps", "causality", "padding", "chunks", "rewind"]
    report = check_cached_model(
        lambda: make().decoder, sources=source, max_length=9, checks=checks
    )
    assert set(report) == set(checks) and max(report.values()) < 1e-3
    with raises(ValueError, "no inputs named ['features']"):
        check_cached_model(
            lambda: make().decoder, sources={"features": np.ones((1, 2))}
        )
