"""Models of two sequences: layers of the source have no part in the target's cache."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    CachedLayer,
    PositionEmbedding,
    Retention,
    SinusoidalPositions,
    call_sites,
    call_with_cache,
    create_cache,
)
from attention.contract import NewCacheScope
from blocks import CustomDecoder, CustomEncoder
from tests.attention.testing.test_conformance import LAYERS
from tests.helpers import (
    WIDTH,
    assert_close,
    built,
    raises,
    randomize,
    sample,
    to_numpy,
)

pytestmark = pytest.mark.same_everywhere

SOURCE, TARGET = 5, 9


def make_model(**kwargs):
    """An encoder with cached layers, and a decoder, in one functional model."""
    source = keras.Input((None, WIDTH))
    target = keras.Input((None, WIDTH))
    x = PositionEmbedding(SOURCE, "random_normal", **kwargs)(source)
    x = Retention(2, **kwargs)(source + x)
    encoded = CustomEncoder(24, 4)(x)
    y = target + PositionEmbedding(20, "random_normal")(target)
    outputs = CustomDecoder(24, 4)(y, encoder_sequence=encoded)
    return randomize(keras.Model([source, target], outputs))


def arrays():
    return sample(length=SOURCE, seed=1), sample(length=TARGET)


def test_steps_equal_the_whole_sequence():
    model, (source, target) = make_model(sequence="source"), arrays()
    expected = model([source, target])
    # The encoder knows fewer positions.
    cache = create_cache(model, 3, TARGET, source_length=SOURCE)
    assert len(cache) == len(call_sites(model)) == 2
    assert cache[1][1]["padding_mask"].shape == (3, SOURCE)
    parts = []
    for start in range(0, TARGET, 3):
        part = target[:, start : start + 3]
        outputs, cache = call_with_cache(model, [source, part], cache, start)
        parts.append(to_numpy(outputs))
    assert_close(np.concatenate(parts, axis=1), expected)
    with NewCacheScope(3, TARGET, source_length=SOURCE) as scope:
        assert_close(model([source, target]), expected)
    assert len(scope.layers) == 2


def test_without_a_word_it_is_an_error():
    model, (source, target) = make_model(), arrays()
    cache = create_cache(model, 3, SOURCE)
    with raises(ValueError, '`sequence="source"`', "position_embedding", "5", "2"):
        call_with_cache(model, [source, target[:, :2]], cache, 0)
    with raises(ValueError, "`sequence` must be 'target'", "'encoder'"):
        PositionEmbedding(4, sequence="encoder")


def test_it_is_saved(tmp_path):
    model, (source, target) = make_model(sequence="source"), arrays()
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert len(call_sites(restored)) == 2
    assert_close(restored([source, target]), model([source, target]))


def test_a_source_that_is_given_once():
    target = keras.Input((None, WIDTH))
    encoded = keras.Input((None, WIDTH), optional=True)
    outputs = CustomDecoder(24, 4)(target, encoder_sequence=encoded)
    model = randomize(keras.Model([target, encoded], outputs))
    source, x = arrays()
    expected = model([x, source])
    cache = create_cache(model, 3, TARGET, source_length=SOURCE)
    head, cache = call_with_cache(model, [x[:, :4], source], cache, 0)
    tail, cache = call_with_cache(model, [x[:, 4:], None], cache, 4)
    found = np.concatenate([to_numpy(head), to_numpy(tail)], axis=1)
    assert_close(found, expected)


def test_every_layer_takes_a_source_length():
    for name, make in LAYERS.items():
        layer = built(make(), (None, None, WIDTH))
        pair = (layer.create_cache(2, 6, source_length=3), layer.create_cache(2, 6))
        shapes = [[x.shape for x in keras.tree.flatten(y)] for y in pair]
        assert shapes[0] == shapes[1], name

    class Nothing(CachedLayer):
        def create_cache(self, batch_size, max_length):
            return ops.zeros((batch_size, max_length))

    assert Nothing().create_cache(2, 3, source_length=9).shape == (2, 3)


def test_every_layer_saves_to_which_sequence_it_belongs():
    class Own(CachedLayer):
        def __init__(self, size, **kwargs):
            super().__init__(**kwargs)
            self.size = size

    for made in (
        Own(3, sequence="source"),
        PositionEmbedding(3, sequence="source"),
        CustomDecoder(24, 4, sequence="source"),
    ):
        again = type(made).from_config(made.get_config())
        assert again.sequence == "source"
    assert Own.from_config(Own(3).get_config()).sequence == "target"


@pytest.mark.parametrize("interleaved", [False, True])
def test_sinusoidal_positions_are_the_papers(interleaved):
    layer = SinusoidalPositions(100.0, interleaved)
    angles = np.arange(TARGET)[:, None] / 100.0 ** (np.arange(0, WIDTH, 2) / WIDTH)
    expected = np.zeros((TARGET, WIDTH))
    halves = slice(None, WIDTH // 2), slice(WIDTH // 2, None)
    even, odd = (slice(0, None, 2), slice(1, None, 2)) if interleaved else halves
    expected[:, even], expected[:, odd] = np.sin(angles), np.cos(angles)
    assert_close(layer(sample(length=TARGET))[0], expected)
    found, _ = layer(sample(length=1), cache=(), cache_update_index=np.array([3, 0, 8]))
    assert_close(found[:, 0], expected[[3, 0, 8]])
    with raises(ValueError, "even width"):
        SinusoidalPositions()(np.zeros((1, 2, 3)))
