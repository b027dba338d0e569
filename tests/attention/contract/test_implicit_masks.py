"""The masks that Keras attaches to tensors count as padding masks."""

import keras
import numpy as np
import pytest

from attention import (
    CrossAttention,
    MultiHeadAttention,
    Retention,
    RotaryAttention,
    call_with_cache,
    create_cache,
)
from blocks import CustomDecoder, CustomEncoder
from tests.helpers import assert_close, sample, to_numpy

TOKENS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [9, 0, 0, 0, 0]])
REAL = TOKENS != 0


def embed(tokens):
    return keras.layers.Embedding(
        10, 16, mask_zero=True, embeddings_initializer="random_normal"
    )(tokens)


def decode(tokens, source):
    x = keras.layers.Embedding(10, 16)(tokens)
    return CustomDecoder(24, 4)(x, encoder_sequence=source)


MODELS = {
    "attention": lambda t, s: MultiHeadAttention(4, causal=False)(embed(t)),
    "two": lambda t, s: MultiHeadAttention(4, causal=False)(
        RotaryAttention(4, causal=False)(embed(t))
    ),
    "encoder": lambda t, s: CustomEncoder(24, 4)(CustomEncoder(24, 4)(embed(t))),
    "decoder": lambda t, s: CustomDecoder(24, 4)(embed(t)),
    "retention": lambda t, s: Retention(4)(embed(t)),
    "cross": lambda t, s: CrossAttention(4)(
        keras.layers.Embedding(10, 16)(s), embed(t)
    ),
    "cross_block": lambda t, s: decode(s, CustomEncoder(24, 4)(embed(t))),
}


def make(name):
    tokens, others = (keras.Input((None,), dtype="int32", name=x) for x in "ts")
    outputs = MODELS[name](tokens, others)
    return keras.Model([tokens, others], outputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_padding_of_embeddings_that_mask_zero_is_not_seen(name, tmp_path):
    model = make(name)
    others = np.array([[1, 2], [3, 4], [5, 6]])
    reads = name.startswith("cross")
    outputs = to_numpy(model([TOKENS, others]))
    for row, length in enumerate(REAL.sum(axis=1)):
        alone = model([TOKENS[row : row + 1, :length], others[row : row + 1]])
        found = outputs[row : row + 1] if reads else outputs[row : row + 1, :length]
        assert_close(found, alone)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(again([TOKENS, others]), outputs)


def test_a_mask_that_is_given_counts_more():
    layer, x = MultiHeadAttention(4, causal=False), sample()
    first = np.zeros(x.shape[:2], bool)
    first[:, :1] = True
    expected = layer(x, padding_mask=first)
    assert_close(layer(x, mask=first), expected)
    assert_close(layer(x, padding_mask=first, mask=~first), expected)
    assert_close(layer(x, None, None, None, first, mask=~first), expected)


@pytest.mark.parametrize("name", ["decoder", "retention"])
@pytest.mark.slow
def test_with_a_cache_too(name):
    tokens = keras.Input((None,), dtype="int32")
    model = keras.Model(tokens, MODELS[name](tokens, None))
    cache = create_cache(model, batch_size=3, max_length=8)
    head, cache = call_with_cache(model, TOKENS, cache, 0)
    lengths = REAL.sum(axis=1)
    tail, _ = call_with_cache(model, np.full((3, 1), 2), cache, lengths)
    for row, length in enumerate(lengths):
        alone = to_numpy(model(np.append(TOKENS[row, :length], 2)[None]))
        assert_close(to_numpy(head)[row, :length], alone[0, :-1])
        assert_close(to_numpy(tail)[row, 0], alone[0, -1])
