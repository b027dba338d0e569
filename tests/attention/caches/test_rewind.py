"""Taking back the last positions of a cache: who can, and what the kit says of it."""

import functools

import keras
import numpy as np
import pytest

from attention import (
    CompositeCachedLayer,
    MultiHeadAttention,
    PositionEmbedding,
    RotaryAttention,
    SharedKeyValueAttention,
    call_sites,
    can_rewind,
    create_cache,
)
from attention.testing import ConformanceError, check_cached_layer, check_cached_model
from tests.helpers import (
    BATCH,
    LENGTH,
    WIDTH,
    EmbedAndAttendTwice,
    ProducerAndReader,
    built,
    raises,
    secret,
)
from tests.planted_faults import Leak

SIZES = {"hidden_dim": 8, "max_length": 12}


class AttendAndLeak(CompositeCachedLayer):
    """Attention, which can be rewound, and a recurrence, which can't."""

    def build(self, inputs_shape):
        self.attend, self.leak = MultiHeadAttention(2), Leak()
        self.attend.build(inputs_shape)
        self.leak.build(inputs_shape)

    def transform(self, x, padding_mask=None):
        return x + self.leak(self.attend(x))


def models(layer):
    inputs = keras.Input((None, WIDTH))
    return keras.Model(inputs, layer(MultiHeadAttention(2)(inputs)))


@pytest.mark.parametrize(
    "make_layer, expected",
    [
        (Leak, False),
        (lambda: MultiHeadAttention(2), True),
        (lambda: RotaryAttention(4, 1), True),
        (lambda: PositionEmbedding(LENGTH), True),
        (lambda: SharedKeyValueAttention(4), True),
        (EmbedAndAttendTwice, True),
        (ProducerAndReader, True),
        (AttendAndLeak, False),
    ],
)
def test_which_layers_can(make_layer, expected):
    layer = built(make_layer())
    cache = layer.create_cache(BATCH, LENGTH)
    for indices in ((7, 6), (7, 0), (1, 0), (np.int32(LENGTH), np.int64(1))):
        assert layer.can_rewind(cache, *indices) is expected
    # Where nothing is taken back, any cache serves.
    for index in (0, 5, np.int32(LENGTH)):
        assert layer.can_rewind(cache, index, index) is True


@pytest.mark.parametrize(
    "from_index, to_index",
    [(3, 4), (-1, -1), (4, -1), (4.0, 3), (4, True), (None, 0), (secret(3), 0)],
)
def test_indices_that_mean_nothing(from_index, to_index):
    parts = ["`from_index`", "`to_index`", "Received: from_index=", ", to_index="]
    for layer in (built(Leak()), built(RotaryAttention(4)), built(AttendAndLeak())):
        with raises(ValueError, *parts):
            layer.can_rewind(layer.create_cache(BATCH, LENGTH), from_index, to_index)
    with raises(ValueError, *parts):
        can_rewind((), (), from_index, to_index)


def test_a_model_can_if_all_of_its_layers_can():
    attend = MultiHeadAttention(4)
    model = models(attend)
    cache = create_cache(model, BATCH, LENGTH)
    assert can_rewind(call_sites(model), cache, 9, 4) is True
    mixed = models(Leak())
    cache = create_cache(mixed, BATCH, LENGTH)
    assert can_rewind(call_sites(mixed), cache, 9, 4) is False
    assert can_rewind(call_sites(mixed), cache, 9, 9) is True
    with raises(ValueError, "`cache` has 1 slots", "2 cached calls"):
        can_rewind(call_sites(mixed), cache[:1], 9, 4)


# === The messages of the kit ===


CHECKS = ["prefill_and_steps", "chunks", "positions", "padding", "capacity", "rewind"]


@pytest.mark.parametrize(
    "answer, claim",
    [
        (lambda a, b: True, "can_rewind(cache, 8, 4)"),
        (lambda a, b: a <= 5 + 1, "can_rewind(cache, 6, 1)"),
        (lambda a, b: a - b <= 2, "can_rewind(cache, 12, 10)"),
    ],
)
def test_a_window_that_does_not_know_what_it_dropped(answer, claim):
    class Forgetful(RotaryAttention):
        def can_rewind(self, cache, from_index, to_index):
            return answer(from_index, to_index)

    with pytest.raises(ConformanceError) as error:
        make = functools.partial(Forgetful, 4, 2, window=5)
        check_cached_layer(make, checks=CHECKS, **SIZES)
    assert error.value.check == "rewind"
    assert f"`{claim}` is True" in str(error.value)
    assert "or `can_rewind` returns False" in str(error.value)


@pytest.mark.parametrize(
    "answer, parts",
    [
        (None, ["must return True or False", "It returned None"]),
        (np.float32(1), ["must return True or False"]),
        (False, ["can_rewind(cache, 4, 4)", "is False", "`from_index == to_index`"]),
    ],
)
def test_answers_that_are_none(answer, parts):
    class Silent(Leak):
        def can_rewind(self, cache, from_index, to_index):
            return answer

    with raises(ConformanceError, *parts):
        check_cached_layer(Silent, checks="rewind", **SIZES)


def test_models_are_asked_layer_by_layer():
    # A layer that can't be rewound has nothing to show.
    report = check_cached_model(lambda: models(Leak()), checks="rewind")
    assert report == {"rewind": 0.0}
    fault = "a state that says it gives tokens back"
    with pytest.raises(ConformanceError, match="serves as one that has processed"):
        check_cached_model(lambda: models(Leak(fault)), checks="rewind")
