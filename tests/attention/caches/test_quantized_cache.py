"""A cache in 8 bits says what one in full precision says, on real text."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import RotaryAttention, call_with_cache, create_cache
from attention.caches.quantized_cache import dequantize
from blocks import CausalLM, CustomBackbone
from tests.helpers import to_numpy
from tests.models import log_softmax, randomize

ROWS, LENGTH, PREFILL = 4, 96, 60


class Backbone(CustomBackbone):
    cache_dtype = None

    def create_attention_layer(self, inputs_shape, layer_index):
        return RotaryAttention(4, 2, cache_dtype=self.cache_dtype)


class Int8Backbone(Backbone):
    cache_dtype = "int8"


def make(cls):
    keras.utils.set_random_seed(0)
    return CausalLM(
        cls(
            vocabulary_size=256,
            num_layers=2,
            num_heads=4,
            hidden_dim=32,
            intermediate_dim=64,
            learned_positions=False,
        )
    )


def pieces(count, length, seed):
    from pydoc_data.topics import topics

    text = np.frombuffer(topics["for"].encode() + topics["class"].encode(), np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return text[starts[:, None] + np.arange(length)].astype("int32")


def in_8_bits(full):
    """A model with the same weights, and a cache in 8 bits."""
    int8 = make(Int8Backbone)
    int8.set_weights(full.get_weights())
    return int8


def run(lm, tokens):
    """Logits of a prefill and single tokens with a cache, and the cache."""
    cache, found = create_cache(lm.backbone, ROWS, LENGTH), []
    start = 0
    for size in (PREFILL, *[1] * (LENGTH - PREFILL)):
        part = tokens[:, start : start + size]
        inputs = {"token_ids": part, "padding_mask": np.ones_like(part)}
        index = ops.convert_to_tensor(np.int32(start))
        hidden, cache = call_with_cache(lm.backbone, inputs, cache, index)
        found.append(to_numpy(lm.compute_logits(hidden)))
        start += size
    return np.concatenate(found, axis=1), cache


def loss(logits, tokens):
    scores = log_softmax(logits[:, :-1])
    return -np.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.slow
def test_the_error_on_real_text():
    """After a little training on real text."""
    full = make(Backbone)
    full.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy")
    tokens = pieces(640, 33, seed=0)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, 1:])}
    history = full.fit(inputs, tokens[:, 1:], batch_size=8, epochs=2, verbose=0)
    # It knows more than how often each byte is there.
    assert history.history["loss"][-1] < 3.0
    int8 = in_8_bits(full)
    tokens = pieces(ROWS, LENGTH, seed=1)
    expected, _ = run(full, tokens)
    found, _ = run(int8, tokens)
    errors = np.abs(found - expected)
    # It is rounded, by little: logits are spread by more than one.
    assert expected.std() > 1.0
    assert 0 < errors.max() < 0.1 * expected.std()
    assert abs(loss(found, tokens) - loss(expected, tokens)) < 5e-3
    agree = found.argmax(axis=-1) == expected.argmax(axis=-1)
    assert agree.mean() > 0.98


def test_each_head_of_each_token_is_rounded_by_half_a_step():
    full = make(Backbone)
    randomize(full)
    tokens = pieces(ROWS, LENGTH, seed=2)
    exact, rounded = (run(lm, tokens)[1] for lm in (full, in_8_bits(full)))
    # The first layer sees the same in both models.
    exact, rounded = exact[0][0], rounded[0][0]
    assert set(rounded) == {"key", "value", "key_scale", "value_scale"}
    for name in ("key", "value"):
        x, scale = to_numpy(exact[name]), to_numpy(rounded[f"{name}_scale"])
        assert keras.backend.standardize_dtype(rounded[name].dtype) == "int8"
        back = to_numpy(dequantize(rounded[name], rounded[f"{name}_scale"], "float32"))
        assert back.shape == x.shape
        assert (np.abs(back - x) <= 0.501 * scale + 1e-5).all()
        largest = np.abs(x).max()
        assert largest > 0.5
        assert 0 < scale.max() <= largest / 127 * 1.001
    # Of 8 numbers a head in two layers' keys and values: a byte each, and a scale
    # of four.
    for lm, each in ((full, 8 * 4), (in_8_bits(full), 8 + 4)):
        leaves = keras.tree.flatten(create_cache(lm.backbone, 1, LENGTH))
        assert sum(to_numpy(x).nbytes for x in leaves) == 2 * 2 * 2 * LENGTH * each
