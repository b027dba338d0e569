"""Blocks that encode, and blocks that attend to what was encoded."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import T5Attention
from blocks import CustomDecoder, CustomEncoder, MixtureOfExperts
from tests.helpers import (
    WIDTH,
    as_index,
    assert_close,
    compiled,
    gradients,
    raises,
    randomize,
    sample,
    slow,
    to_numpy,
)

pytestmark = pytest.mark.same_everywhere

SIZES = {"intermediate_dim": 24, "num_heads": 4}
LENGTH, SOURCE = 9, 7
MASK = np.arange(SOURCE)[None] < np.array([SOURCE, 3, 1])[:, None]


@pytest.mark.parametrize("normalize_first", [True, False])
def test_an_encoder_sees_both_directions_and_no_padding(normalize_first):
    encoder = CustomEncoder(**SIZES, normalize_first=normalize_first)
    x = sample(length=SOURCE)
    encoder(x)
    randomize(encoder)
    outputs = to_numpy(encoder(x, padding_mask=MASK))
    for row, length in enumerate(MASK.sum(axis=1)):
        alone = encoder(x[row : row + 1, :length])
        assert_close(outputs[row : row + 1, :length], alone)
    changed = x.copy()
    changed[:, -1] *= -1
    moved = np.abs(to_numpy(encoder(changed)) - to_numpy(encoder(x)))
    assert (moved.max(axis=-1) > 1e-4).all()


def test_an_encoder_has_the_hooks():
    class Relative(CustomEncoder):
        def create_attention_layer(self, inputs_shape):
            return T5Attention(self.num_heads, causal=False)

        def create_norm(self, inputs_shape):
            return keras.layers.RMSNormalization()

    encoder = Relative(**SIZES)
    assert encoder(sample()).shape == sample().shape
    assert isinstance(encoder.self_attention, T5Attention)
    assert encoder.self_attention.name == "self_attention"
    assert "scale" in encoder.ffn_norm.weights[0].path
    config = CustomEncoder.from_config(CustomEncoder(**SIZES).get_config())
    assert config.intermediate_dim == 24


def test_an_encoder_in_a_remat_scope():
    with keras.RematScope(mode="full"):
        again = CustomEncoder(**SIZES)
        again.build((None, None, WIDTH))
    encoder = CustomEncoder(**SIZES)
    encoder.build((None, None, WIDTH))
    randomize(encoder)
    again.set_weights(encoder.get_weights())
    x, mask = (ops.convert_to_tensor(x) for x in (sample(length=SOURCE), MASK))
    assert_close(again(x, padding_mask=mask), encoder(x, padding_mask=mask))
    for pair in zip(*(gradients(y, x, padding_mask=mask) for y in (again, encoder))):
        assert_close(*pair, atol=1e-3)


def decoder_and_inputs(cls=CustomDecoder, **kwargs):
    decoder = cls(**SIZES, **kwargs)
    x, source = sample(length=LENGTH), sample(length=SOURCE, width=6, seed=1)
    decoder(x, encoder_sequence=source)
    return randomize(decoder), x, source


@pytest.mark.parametrize("normalize_first", [True, slow(False)])
def test_a_decoder_reads_its_source_once(normalize_first):
    decoder, x, source = decoder_and_inputs(normalize_first=normalize_first)
    encoded = {"encoder_sequence": source, "encoder_padding_mask": MASK}
    expected = to_numpy(decoder(x, **encoded))
    # The source matters, and its padding does not.
    other = to_numpy(decoder(x, encoder_sequence=-source))
    assert np.abs(other - expected).max() > 0.01
    spoiled = np.where(MASK[..., None], source, 1e6).astype("float32")
    assert_close(decoder(x, **{**encoded, "encoder_sequence": spoiled}), expected)
    cache = decoder.create_cache(3, LENGTH, source_length=SOURCE)
    head, cache = decoder(x[:, :4], cache=cache, cache_update_index=0, **encoded)
    assert_close(head, expected[:, :4])
    step = compiled(
        lambda x, cache, index: decoder(x, cache=cache, cache_update_index=index)
    )
    for start in range(4, LENGTH):
        new = ops.convert_to_tensor(x[:, start : start + 1])
        outputs, cache = step(new, cache, as_index("rows", start))
        assert_close(outputs, expected[:, start : start + 1])


def test_a_source_that_comes_too_late_is_refused():
    called, built = CustomDecoder(**SIZES), CustomDecoder(**SIZES)
    called(sample())
    assert called.cross_attention is None
    assert not any("cross" in weight.path for weight in called.weights)
    built.build((None, None, WIDTH))
    for decoder in (called, built):
        with raises(ValueError, decoder.name, "`encoder_sequence`", "the first time"):
            decoder(sample(), encoder_sequence=sample())


def test_a_block_is_built_for_a_source():
    class Decoder(CustomDecoder):
        cross_attention_norm_names = ("cross_attention_norm", "post_norm")

    called, _, source = decoder_and_inputs(Decoder)
    built = Decoder(**SIZES)
    built.build((None, None, WIDTH), encoder_shape=(None, None, source.shape[-1]))
    assert [x.shape for x in built.weights] == [x.shape for x in called.weights]
    assert built.post_norm.built
    for decoder in (called, built):
        copy = Decoder.from_config(decoder.get_config())
        copy.build_from_config(decoder.get_build_config())
        copy.set_weights(called.get_weights())
        outputs = called(sample(), encoder_sequence=source)
        assert_close(copy(sample(), encoder_sequence=source), outputs)
    with raises(TypeError, "`encoder_shape`", "source_shape"):
        Decoder(**SIZES).build((None, None, WIDTH), source_shape=(None, None, 6))
    Decoder.cross_attention_norm_names = ("ffn_norm",)
    with raises(ValueError, "Decoder.cross_attention_norm_names", "taken"):
        decoder_and_inputs(Decoder)


def test_padding_does_not_count_in_the_loss_of_an_encoders_experts():
    class Encoder(CustomEncoder):
        def create_ffn(self, inputs_shape):
            return MixtureOfExperts(4, 32, balance_weight=1.0)

    encoder, x = Encoder(**SIZES), sample()
    mask = np.arange(x.shape[1])[None] < np.array([2, 5, 7])[:, None]
    losses = []
    for padding in (0.0, 3.0):
        padded = np.where(mask[..., None], x, padding * sample(seed=1))
        encoder(padded.astype("float32"), padding_mask=mask, training=True)
        losses.append(float(to_numpy(encoder.losses[0])))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    encoder(x, training=True)
    assert float(to_numpy(encoder.losses[0])) != pytest.approx(losses[0], rel=1e-3)


def test_the_hook_of_cross_attention():
    class Decoder(CustomDecoder):
        def create_cross_attention_layer(self, inputs_shape):
            self.width_seen = inputs_shape[-1]
            return super().create_cross_attention_layer(inputs_shape)

    decoder, _, _ = decoder_and_inputs(Decoder)
    assert decoder.width_seen == 16
    assert decoder.cross_attention.name == "cross_attention"
    Decoder.create_cross_attention_layer = lambda *args: keras.layers.Dense(4)
    with raises(TypeError, "create_cross_attention_layer"):
        decoder_and_inputs(Decoder)


@pytest.mark.slow
def test_a_model_of_both_learns_and_is_saved(tmp_path):
    source, target = keras.Input((None, 6)), keras.Input((None, 16))
    mask = keras.Input((None,), dtype="bool")
    encoded = keras.layers.Dense(16)(source)
    encoded = CustomEncoder(**SIZES)(encoded, padding_mask=mask)
    outputs = CustomDecoder(**SIZES)(
        target, encoder_sequence=encoded, encoder_padding_mask=mask
    )
    model = keras.Model([source, target, mask], outputs)
    model.compile("adam", "mse")
    inputs = [sample(length=SOURCE, width=6), sample(length=LENGTH), MASK]
    goal = np.zeros((3, LENGTH, 16), "float32")
    losses = model.fit(inputs, goal, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert_close(restored(inputs), model(inputs))
