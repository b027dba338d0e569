"""What a cache in 8 bits holds; that it decodes rightly is for the conformance suite."""

import keras
import numpy as np

from attention import RotaryAttention
from attention.caches.quantized_cache import dequantize
from tests.helpers import BATCH, LENGTH, built, run_chunks, sample, to_numpy


def test_each_head_of_each_token_is_rounded_by_half_a_step():
    full, int8 = (built(RotaryAttention(4, 2, cache_dtype=x)) for x in (None, "int8"))
    exact, rounded = (
        run_chunks(layer, sample(), [7, *[1] * 5])[1] for layer in (full, int8)
    )
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
    # Of 4 numbers a head in keys and values: a byte each, and a scale of four.
    for cache, each in ((exact, 4 * 4), (rounded, 4 + 4)):
        size = sum(to_numpy(x).nbytes for x in keras.tree.flatten(cache))
        assert size == BATCH * 2 * 2 * LENGTH * each
