"""Pictures: what is drawn, without a display and without `pyplot`."""

import sys

import keras
import pytest
from matplotlib import pyplot

from blocks import plot_history
from tests.helpers import raises

pytestmark = pytest.mark.same_everywhere


def lines_of(ax):
    return {x.get_label(): [*map(list, x.get_data())] for x in ax.get_lines()}


def test_history():
    history = keras.callbacks.History()
    history.epoch = [2, 3, 4, 5]
    history.history = {
        "accuracy": [0.1, 0.2, 0.3, 0.4],
        "loss": [4.0, 3.0, 2.0, 1.0],
        "tokens_per_second": [float("nan"), 7.0, 8.0, 9.0],
        "val_loss": [4.5, 3.5],
    }
    figure = plot_history(history)
    loss, accuracy, speed = figure.axes
    assert lines_of(loss) == {
        "loss": [[3, 4, 5, 6], [4.0, 3.0, 2.0, 1.0]],
        "val_loss": [[4, 6], [4.5, 3.5]],
    }
    assert lines_of(accuracy) == {"accuracy": [[3, 4, 5, 6], [0.1, 0.2, 0.3, 0.4]]}
    assert [x.get_ylabel() for x in (loss, accuracy, speed)] == [
        "loss",
        "accuracy",
        "tokens_per_second",
    ]
    assert not pyplot.get_fignums()
    # As notebooks ask for it.
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_histories_that_are_none():
    with raises(TypeError, "`history` must be", "list"):
        plot_history([1.0])
    for empty in ({}, keras.callbacks.History()):
        with raises(ValueError, "no epoch"):
            plot_history(empty)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with raises(ImportError, "Pictures", "keras-transformer-blocks[plots]"):
        plot_history({"loss": [1.0]})
