"""Taking back the last positions of a cache: who can, and what the kit says of it."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    CachedLayer,
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


def built(layer):
    layer.build((None, None, WIDTH))
    return layer


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


class Window(CachedLayer):
    """The sum of the last `width` tokens, which stand in a ring of as many slots.

    Up to `width` tokens, none has lost its slot; after that one can be taken
    back, as the token that it replaced is outside of the next window.
    """

    width = 5

    def create_cache(self, batch_size, max_length):
        return ops.zeros((batch_size, self.width, 8), self.compute_dtype)

    def can_rewind(self, cache, from_index, to_index):
        taken = from_index - to_index
        return super().can_rewind(cache, from_index, to_index) or (
            from_index <= self.width or taken <= 1
        )

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        width, length = self.width, x.shape[1]
        ring = self.create_cache(ops.shape(x)[0], 1) if cache is None else cache
        index = 0 if cache is None else cache_update_index
        index = ops.reshape(ops.convert_to_tensor(index, dtype="int32"), (-1, 1))
        index = ops.broadcast_to(index, (ops.shape(x)[0], 1))
        before = index - width + ops.arange(width)
        past = ops.take_along_axis(ring, ops.mod(before, width)[..., None], axis=1)
        past = ops.where(before[..., None] >= 0, past, 0)
        seen = ops.concatenate([past, x], axis=1)
        sums = sum(seen[:, i : i + length] for i in range(1, width + 1))
        if cache is None:
            return sums
        steps = ops.arange(length)[None]
        real = ops.ones(ops.shape(x)[:2], "bool") if padding_mask is None else None
        real = ops.cast(padding_mask, "bool") if real is None else real
        count = ops.sum(ops.cast(real, "int32"), axis=1, keepdims=True)
        real = ops.logical_and(real, steps >= count - width)
        chosen = ops.mod(index + steps, width)[..., None] == ops.arange(width)
        chosen = ops.logical_and(chosen, real[..., None])
        new = ops.einsum("blw,bld->bwd", ops.cast(chosen, x.dtype), x)
        return sums, ops.where(ops.any(chosen, axis=1)[..., None], new, ring)


CHECKS = ["prefill_and_steps", "chunks", "positions", "padding", "capacity", "rewind"]


def test_a_window_that_knows_what_it_dropped():
    report = check_cached_layer(Window, checks=CHECKS, **SIZES)
    assert report["rewind"] < 1e-4


@pytest.mark.parametrize(
    "answer, claim",
    [
        (lambda a, b: True, "can_rewind(cache, 8, 4)"),
        (lambda a, b: a <= Window.width + 1, "can_rewind(cache, 6, 1)"),
        (lambda a, b: a - b <= 2, "can_rewind(cache, 12, 10)"),
    ],
)
def test_a_window_that_does_not(answer, claim):
    class Forgetful(Window):
        def can_rewind(self, cache, from_index, to_index):
            return answer(from_index, to_index)

    with pytest.raises(ConformanceError) as error:
        check_cached_layer(Forgetful, checks=CHECKS, **SIZES)
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
