"""Encoder backbones: every token of a row sees all others, and no other row."""

import keras
import numpy as np
import pytest

from attention import GroupedQueryAttention, RotaryAttention
from blocks import CustomDecoder, CustomEncoder, CustomEncoderBackbone
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
}
LENGTHS = np.array([9, 3, 6])


@keras.saving.register_keras_serializable(package=PACKAGE)
class RotaryEncoderBackbone(CustomEncoderBackbone):
    """Windows, norms before the layers, and no types."""

    def __init__(self, *args, **kwargs):
        options = {"normalize_first": True, "num_token_types": None}
        super().__init__(*args, learned_positions=False, **{**options, **kwargs})

    def create_attention_layer(self, inputs_shape, layer_index):
        window = 3 if layer_index else None
        return RotaryAttention(self.num_heads, 2, causal=False, window=window)

    def create_norm(self, inputs_shape, layer_index):
        return keras.layers.RMSNormalization()

    def create_embeddings_norm(self):
        return keras.layers.Identity()

    def get_config(self):
        config = super().get_config()
        del config["learned_positions"]
        return config


KINDS = {"stock": CustomEncoderBackbone, "rotary": RotaryEncoderBackbone}


def make(kind="stock", **kwargs):
    return randomize(KINDS[kind](**{**SIZES, **kwargs}))


def arrays(kind="stock"):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 40, (3, LENGTHS.max())).astype("int32")
    mask = (np.arange(LENGTHS.max()) < LENGTHS[:, None]).astype("int32")
    x = {"token_ids": tokens, "padding_mask": mask}
    if kind == "stock":
        x["token_type_ids"] = rng.integers(0, 2, tokens.shape).astype("int32")
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_it_is_alone(kind):
    backbone, x = make(kind), arrays(kind)
    whole = backbone(x)
    for row, length in enumerate(LENGTHS):
        part = {name: value[row : row + 1, :length] for name, value in x.items()}
        assert_close(whole[row, :length], backbone(part)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_see_later_ones(kind):
    backbone, x = make(kind), arrays(kind)
    before = to_numpy(backbone(x))
    x["token_ids"][0, 8] += 1
    after = to_numpy(backbone(x))
    assert np.abs(after - before)[0, 0].max() > 1e-3
    assert_close(after[1:], before[1:])


def test_types_are_0_where_none_are_given():
    backbone, x = make(), arrays()
    typed = to_numpy(backbone(x))
    del x["token_type_ids"]
    zeros = backbone({**x, "token_type_ids": np.zeros_like(x["token_ids"])})
    assert_close(backbone(x), zeros)
    assert_close(backbone.predict(x, verbose=0), zeros)
    assert np.abs(typed - to_numpy(zeros)).max() > 1e-3
    one_type = CustomEncoderBackbone(**SIZES, num_token_types=1)
    assert set(one_type.input) == {"token_ids", "padding_mask"}
    assert one_type.token_type_embedding is not None


def test_hooks_and_weight_paths():
    class Encoder(CustomEncoder):
        norm_names = ("attention_norm", "extra_norm", "ffn_norm")

    class Backbone(CustomEncoderBackbone):
        encoder_class = Encoder

        def create_encoder(self, layer_index):
            # The second block is the first one again.
            return (self.transformer_layers or [super().create_encoder(0)])[0]

    backbone = Backbone(**SIZES)
    paths = {weight.path for weight in backbone.weights}
    assert "transformer_layer_0/extra_norm/gamma" in paths
    assert not any("layer_1" in path for path in paths)
    assert {"token_type_embedding/embeddings", "embeddings_norm/gamma"} <= paths
    assert not any(path.startswith("layer_norm/") for path in paths)
    first = CustomEncoderBackbone(**SIZES, normalize_first=True)
    assert "layer_norm/gamma" in {weight.path for weight in first.weights}
    Backbone.encoder_class = CustomDecoder
    with raises(TypeError, "`Backbone.encoder_class`"):
        Backbone(**SIZES)


def test_causal_attention_is_an_error():
    class Causal(CustomEncoderBackbone):
        def create_attention_layer(self, inputs_shape, layer_index):
            return GroupedQueryAttention(self.num_heads, self.num_heads)

    with raises(ValueError, "`create_attention_layer`", "`causal=False`"):
        Causal(**SIZES)
    with raises(ValueError, "`num_token_types`"):
        CustomEncoderBackbone(**SIZES, num_token_types=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_presets(kind, tmp_path):
    backbone, x = make(kind), arrays(kind)
    backbone.save_to_preset(str(tmp_path))
    restored = KINDS[kind].from_preset(str(tmp_path))
    assert_close(restored(x), backbone(x))


def test_rematerialized_blocks_have_the_same_outputs_and_gradients():
    plain, x = make(dropout=0.0), arrays()
    remat = CustomEncoderBackbone.from_config({**plain.get_config(), "remat": "block"})
    remat.set_weights(plain.get_weights())
    assert_close(remat(x), plain(x))
    losses = []
    for backbone in (plain, remat):
        outputs = keras.layers.Dense(1, kernel_initializer="ones")(backbone.output)
        model = keras.Model(backbone.input, outputs)
        model.compile("sgd", "mse")
        history = model.fit(x, np.ones((3, 9, 1)), epochs=2, verbose=0)
        losses.append(history.history["loss"])
    assert_close(losses[0], losses[1])
