"""Errors of `SharedKeyValueAttention` for keys it can't attend to."""

import numpy as np
import pytest

from attention import SharedKeyValueAttention
from tests.helpers import BATCH, LENGTH, raises, sample, secret


@pytest.fixture
def key_value():
    return {
        "key": secret(BATCH, 2, LENGTH, 4),
        "value": secret(BATCH, 2, LENGTH, 4),
        "positions": np.zeros((BATCH, LENGTH), "int32"),
    }


@pytest.mark.parametrize(
    "change, kind, parts",
    [
        (lambda kv: None, TypeError, ["key_value=None", "return_key_value=True"]),
        (lambda kv: kv["key"], TypeError, ["key_value=float32 tensor of shape"]),
        (lambda kv: (kv["key"], kv["value"]), TypeError, ["key_value=tuple("]),
        (lambda kv: {"key": kv["key"]}, ValueError, ["can't attend", "{'key': "]),
        (lambda kv: {**kv, "more": kv["key"]}, ValueError, ["'more'"]),
        (lambda kv: {**kv, "value": None}, TypeError, ["'value': None", "tensors"]),
        (
            lambda kv: {**kv, "positions": secret(BATCH, LENGTH)},
            TypeError,
            ["integers as positions"],
        ),
        (lambda kv: {**kv, "key": kv["key"][0]}, ValueError, ["do not fit"]),
        (lambda kv: {**kv, "key": kv["key"][:2]}, ValueError, ["(2, 2, 12, 4)"]),
        (lambda kv: {**kv, "value": kv["value"][:, :, :5]}, ValueError, ["12, 4", "5"]),
        (
            lambda kv: {**kv, "positions": kv["positions"][:, :5]},
            ValueError,
            [f"({BATCH}, 5)"],
        ),
        (lambda kv: {**kv, "value": kv["value"][:, :1]}, ValueError, ["do not fit"]),
        (lambda kv: {k: x[:1] for k, x in kv.items()}, ValueError, ["query="]),
    ],
)
def test_what_is_no_key_value(key_value, change, kind, parts):
    reader = SharedKeyValueAttention(4, name="reader")
    with raises(kind, "Layer 'reader'", *parts):
        reader(sample(), change(key_value))


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"num_heads": 4, "num_key_value_heads": 4}, ["num_key_value_heads=4"]),
        ({"num_heads": 1}, ["num_heads=1"]),
        ({"num_heads": 4, "key_dim": 8}, ["key_dim=8"]),
        ({"num_heads": 4, "value_dim": 3}, ["value_dim=3"]),
    ],
)
def test_heads_that_do_not_fit(key_value, settings, parts):
    reader = SharedKeyValueAttention(**settings, name="reader")
    with raises(ValueError, "Layer 'reader'", "Received: key_value={'key'", *parts):
        reader(sample(), key_value)


def test_arguments_are_checked_as_elsewhere(key_value):
    with raises(ValueError, "num_heads=4, num_key_value_heads=3"):
        SharedKeyValueAttention(4, 3)
    with raises(TypeError, "num_key_value_heads=2.0"):
        SharedKeyValueAttention(4, 2.0)
    with raises(ValueError, "num_heads=3", "key_dim=None"):
        SharedKeyValueAttention(3)(sample(), key_value)
    reader = SharedKeyValueAttention(4)
    with raises(ValueError, "without `cache_update_index`"):
        reader(sample(), key_value, cache=())
    with raises(ValueError, "was not made by layer"):
        reader(sample(), key_value, cache=(key_value,), cache_update_index=0)
    with raises(ValueError, "padding_mask"):
        reader(sample(), key_value, padding_mask=np.ones((BATCH, 3)))
