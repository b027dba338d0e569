"""Chunks of a prompt attend to the filled slots of a large cache, not to all."""

import numpy as np
import pytest
from keras import ops

from attention import AlibiBias, GroupedQueryAttention, LatentAttention, RotaryAttention
from attention.positions.arithmetic import HIDDEN_POSITION
from attention.softmax import filled_slots
from attention.softmax.filled_slots import attend_to_filled
from attention.testing import check_cached_layer
from tests.helpers import compiled, to_numpy

LAYERS = {
    "rotary": lambda: RotaryAttention(4, 2),
    "alibi, sinks": lambda: GroupedQueryAttention(
        4, 2, position=AlibiBias(), attention_sinks=True, logit_soft_cap=5.0
    ),
    "latent": lambda: LatentAttention(4, latent_dim=8, rotary_dim=4),
    "window": lambda: RotaryAttention(4, 2, window=9),
}
CHECKS = ("chunks", "positions", "padding", "masked_rows", "compiled", "gradients")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(filled_slots, "PART_SLOTS", 4)
    monkeypatch.setattr(filled_slots, "MIN_QUERIES", 2)


def sizes_attended(filled, slots=16, queries=2):
    """How many slots are attended, eagerly and compiled, for rows filled so far."""
    positions = np.where(
        np.arange(slots) < np.array(filled)[:, None],
        np.arange(slots),
        HIDDEN_POSITION,
    )
    new = np.array(filled)[:, None] + np.arange(queries)
    positions = np.concatenate([positions, new], axis=1).astype("int32")
    key = np.zeros((len(filled), 1, 3, slots), "float32")
    value = np.swapaxes(key, 2, 3)
    mask = np.ones((len(filled), 1, queries, slots + queries), bool)

    def attend(past, mask, bias):
        key, value = past
        assert key.shape[3] == value.shape[2] == mask.shape[3] - queries
        assert bias is None
        return ops.convert_to_tensor(key.shape[3], "int32")

    def run(key, value, mask, positions):
        return attend_to_filled(attend, (key, value), mask, None, positions)

    arrays = [ops.convert_to_tensor(x) for x in (key, value, mask, positions)]
    eager, graph = run(*arrays), compiled(run)(*arrays)
    return int(to_numpy(eager)), int(to_numpy(graph))


@pytest.mark.parametrize(
    ("filled", "sizes", "expected"),
    [
        ((0,), {}, 4),
        ((4,), {}, 4),
        ((5,), {}, 8),
        ((3, 9, 1), {}, 12),
        ((13,), {}, 16),
        ((16,), {}, 16),
        # Parts of a size that does not divide the slots.
        ((8,), {"slots": 15}, 10),
        ((13,), {"slots": 15}, 15),
        # Few queries and small caches attend to all.
        ((1,), {"queries": 1}, 16),
        ((1,), {"slots": 7}, 7),
    ],
)
def test_as_many_slots_as_the_fullest_row_needs(small_parts, filled, sizes, expected):
    assert sizes_attended(filled, **sizes) == (expected, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.slow
def test_the_contract_is_kept(small_parts, name):
    check_cached_layer(LAYERS[name], checks=CHECKS, max_length=18)
