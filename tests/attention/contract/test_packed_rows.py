"""Documents that share a row (`SegmentScope`): what the conformance kit leaves out."""

import itertools

import keras
import numpy as np
import pytest

from attention import (
    CachedLayer,
    CompositeCachedLayer,
    CrossAttention,
    GatedDeltaNet,
    Mamba2,
    Retention,
    RotaryAttention,
    RWKVTimeMix,
    SegmentScope,
    SharedKeyValueAttention,
    call_with_cache,
    create_cache,
)
from attention.testing import ConformanceError, check_cached_layer
from tests.helpers import assert_close, raises, slow, to_numpy
from tests.models import make_variant

# Documents that end at, before and after the boundaries of chunks and of windows, one
# that is several chunks long, and some of one token.
CUTS = [0, 5, 6, 64, 65, 70, 128, 200, 201]
LENGTH = CUTS[-1]
SEGMENTS = np.repeat(np.arange(len(CUTS) - 1), np.diff(CUTS)).astype("int32")[None]


@pytest.mark.parametrize(
    "make",
    [
        slow(lambda: Retention(2)),
        lambda: GatedDeltaNet(2),
        slow(lambda: Mamba2(4, state_dim=6)),
        slow(lambda: RWKVTimeMix(2)),
        slow(lambda: RotaryAttention(2, window=10)),
    ],
)
def test_boundaries_of_chunks_and_windows(make):
    layer = make()
    x = np.random.default_rng(0).normal(size=(1, LENGTH, 16)).astype("float32")
    with SegmentScope(SEGMENTS):
        packed = to_numpy(layer(x))
    for start, end in itertools.pairwise(CUTS):
        assert_close(packed[:, start:end], layer(x[:, start:end]), atol=1e-5)
    other = np.where(SEGMENTS[..., None] % 2, x, 30 * x[:, ::-1])
    with SegmentScope(SEGMENTS):
        changed = to_numpy(layer(other))
    kept = SEGMENTS[0] % 2 == 1
    np.testing.assert_array_equal(changed[:, kept], packed[:, kept])


def test_rows_of_different_documents_and_padding():
    layer = RotaryAttention(2, window=3)
    x = np.random.default_rng(0).normal(size=(2, 8, 16)).astype("float32")
    segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]])
    with SegmentScope(segments):
        packed = to_numpy(layer(x, padding_mask=segments > 0))
    assert_close(packed[:1, 3:6], layer(x[:1, 3:6]), atol=1e-5)
    assert_close(packed[1:, 1:], layer(x[1:, 1:]), atol=1e-5)


class Sums(CachedLayer):
    """Adds up tokens; it has never heard of documents."""

    def create_cache(self, batch_size, max_length):
        return keras.ops.zeros((batch_size, 1, 16))

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        sums = keras.ops.cumsum(x, axis=1) + (0 if cache is None else cache)
        return sums if cache is None else (sums, sums[:, -1:])


class DeafSums(Sums):
    def call(
        self,
        x,
        padding_mask=None,
        cache=None,
        cache_update_index=None,
        segment_ids=None,
    ):
        return super().call(x, padding_mask, cache, cache_update_index)


class Holder(CompositeCachedLayer):
    def build(self, inputs_shape):
        self.sums = Sums()

    def transform(self, x):
        return self.sums(x)


def test_a_layer_that_knows_no_documents():
    x = np.zeros((2, 4, 16), "float32")
    for make in (Sums, Holder):
        layer = make()
        layer(x)
        ones = np.ones((2, 4), "int32")
        with SegmentScope(ones), raises(TypeError, "segment_ids"):
            layer(x)
        # The kit checks what the layer can do.
        assert "packing" not in check_cached_layer(make, checks=["packing", "rows"])
    with pytest.raises(ConformanceError, match="alone"):
        check_cached_layer(DeafSums, checks="packing")
    # Other tokens than those of the scope.
    with SegmentScope(np.ones((2, 5), "int32")):
        Sums()(x)


def test_no_packed_rows_with_a_cache():
    model = make_variant("rotary", num_layers=1)
    tokens = {"token_ids": np.ones((1, 4), "int32")}
    tokens["padding_mask"] = tokens["token_ids"]
    cache = create_cache(model, 1, 4)
    with SegmentScope(np.ones((1, 4), "int32")), raises(ValueError, "own row"):
        call_with_cache(model, tokens, cache, 0)


def test_wrong_segment_ids():
    with raises(TypeError, "segment_ids", "integer"), SegmentScope(np.ones((1, 2))):
        pass
    with raises(ValueError, "segment_ids", "(batch, length)"), SegmentScope([1, 2]):
        pass


def test_keys_of_another_sequence():
    x = np.random.default_rng(0).normal(size=(1, 4, 16)).astype("float32")
    segments = np.array([[1, 1, 2, 2]])
    layer = CrossAttention(2)
    layer(x, x[:, ::-1])
    with SegmentScope(segments), raises(TypeError, "segment_ids"):
        layer(x, x[:, ::-1])
    layer = SharedKeyValueAttention(2)
    producer = RotaryAttention(2)
    with SegmentScope(segments):
        _, key_value = producer(x, return_key_value=True)
        packed = layer(x, key_value)
    _, key_value = producer(x[:, 2:], return_key_value=True)
    assert_close(packed[:, 2:], layer(x[:, 2:], key_value), atol=1e-5)


def test_rematerialized():
    segments = np.array([[1, 1, 2, 2, 2, 2]])
    with keras.RematScope(mode="full"):
        layer = make_variant("rotary", num_layers=1)
    tokens = np.arange(1, 7)[None]
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    tail = {name: value[:, 2:] for name, value in inputs.items()}
    with SegmentScope(segments):
        packed = layer(inputs)
    assert_close(packed[:, 2:], layer(tail), atol=1e-5)
