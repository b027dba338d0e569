"""Models whose weights come when they are made: in threads, and after errors."""

import concurrent.futures

import keras
import numpy as np
import pytest
from keras import ops

from blocks.checkpoints.loading import weights_from
from tests.helpers import to_numpy
from tests.models import make_backbone

pytestmark = pytest.mark.same_everywhere


def make_dense():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return layer


def kernel_of(layer):
    return to_numpy(layer.kernel)


def in_a_thread(function):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function)


def numbered(number):
    return lambda weights: lambda weight: ops.full(weight.shape, number)


def test_other_threads_draw_their_weights():
    with weights_from(numbered(2.0)):
        mine = make_dense()
        other = in_a_thread(make_dense).result()
    assert (kernel_of(mine) == 2).all()
    assert len(np.unique(kernel_of(other))) == 12


def test_one_load_waits_for_another():
    def load(number):
        with weights_from(numbered(number)):
            return make_dense()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with weights_from(numbered(1.0)):
            other = pool.submit(load, 2.0)
            mine = make_dense()
        assert (kernel_of(other.result()) == 2).all()
    assert (kernel_of(mine) == 1).all()
    assert len(np.unique(kernel_of(make_dense()))) == 12


def fail(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["making", "planning", "reading"])
def test_models_are_made_after_a_load_that_was_stopped(where):
    make_values = fail if where == "planning" else lambda weights: fail
    size = 4 if where == "reading" else 10**13
    layer = keras.layers.Dense(size)
    with pytest.raises(KeyboardInterrupt), weights_from(make_values):
        # More than any memory holds.
        layer.build((None, size))
        make_dense()
        if where == "making":
            fail()
    assert make_backbone().count_params() > 0
    assert len(np.unique(kernel_of(make_dense()))) == 12
