"""Pictures: what is drawn, without a display and without `pyplot`."""

import sys

import keras
import numpy as np
import pytest
from matplotlib import pyplot

from blocks import attention_maps, attention_scores, plot_history
from tests.helpers import raises, to_numpy
from tests.models import bpe_preprocessor, make_lm, make_variant


def lines_of(ax):
    return {x.get_label(): [*map(list, x.get_data())] for x in ax.get_lines()}


@pytest.mark.same_everywhere
def test_history():
    history = keras.callbacks.History()
    history.epoch = [2, 3, 4, 5, 6]
    history.history = {
        "accuracy": [0.1, 0.2, 0.3, 0.4, 0.5],
        "loss": [4.0, 3.0, 2.0, 1.0, 0.0],
        "tokens_per_second": [float("nan"), 7.0, 8.0, 9.0, 7.0],
        "val_loss": [4.5, 3.5],
    }
    figure = plot_history(history)
    loss, accuracy, speed = figure.axes
    assert lines_of(loss) == {
        "loss": [[3, 4, 5, 6, 7], [4.0, 3.0, 2.0, 1.0, 0.0]],
        "val_loss": [[4, 6], [4.5, 3.5]],
    }
    assert lines_of(accuracy) == {
        "accuracy": [[3, 4, 5, 6, 7], [0.1, 0.2, 0.3, 0.4, 0.5]]
    }
    assert [x.get_ylabel() for x in (loss, accuracy, speed)] == [
        "loss",
        "accuracy",
        "tokens_per_second",
    ]
    assert not pyplot.get_fignums()
    # As notebooks ask for it.
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.same_everywhere
def test_histories_that_are_none():
    with raises(TypeError, "`history` must be", "list"):
        plot_history([1.0])
    for empty in ({}, keras.callbacks.History()):
        with raises(ValueError, "no epoch"):
            plot_history(empty)


@pytest.mark.same_everywhere
def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with raises(ImportError, "Pictures", "keras-transformer-blocks[plots]"):
        plot_history({"loss": [1.0]})


def test_scores_of_a_text():
    """Of the layers that have some, without padding, and nothing is left behind."""
    lm = make_lm(make_variant("hybrid", num_layers=4), bpe_preprocessor())
    scores = attention_scores(lm, "the cat")
    assert list(scores) == ["transformer_layer_3/self_attention"]
    [found] = scores.values()
    assert found.shape == (1, 4, 7, 7)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)
    visible = np.broadcast_to(np.tri(7, dtype=bool), found.shape)
    assert (found[~visible] == 0).all() and (found[visible] > 0).all()
    tokens = lm.preprocessor.generate_preprocess(["the cat"])["token_ids"]
    [again] = attention_scores(lm, to_numpy(tokens)[0, :7].tolist()).values()
    np.testing.assert_array_equal(again, found)


@pytest.mark.slow
def test_nothing_is_left_behind():
    lm = make_lm(make_variant("gqa", num_layers=1))
    x = {"token_ids": np.array([[3, 4]]), "padding_mask": np.ones((1, 2), "int32")}
    steps = []
    for _ in range(2):
        lm.generate([3, 4], max_new_tokens=2, stop_token_ids=None)
        lm.fit(x, x["token_ids"], verbose=0)
        steps.append((list(lm.compiled_steps), lm.train_function))
        weights = [to_numpy(w) for w in lm.weights]
        attention_scores(lm, [3, 4])
        for weight, before in zip(lm.weights, weights):
            np.testing.assert_array_equal(to_numpy(weight), before)
    assert steps[0] == steps[1]


@pytest.mark.same_everywhere
def test_maps():
    lm = make_lm(make_variant("gqa"), bpe_preprocessor())
    text = "the cat"
    figure = attention_maps(lm, text, layers=[-1], heads=[2, 0])
    scores = [*attention_scores(lm, text).values()]
    two, zero = figure.axes[:2]
    for ax, head in ((two, 2), (zero, 0)):
        np.testing.assert_array_equal(ax.images[0].get_array(), scores[1][0, head])
        assert ax.get_title() == f"head {head}"
        keys = [x.get_text() for x in ax.get_xticklabels()]
        assert keys == ["<s>", "th", "e", "Ġ", "c", "a", "t"]
    assert [x.get_text() for x in two.get_yticklabels()] == keys
    assert two.get_ylabel() == "transformer_layer_1/self_attention"
    # Of all layers and heads, and a scale of colors.
    assert len(attention_maps(lm, [3, 4]).axes) == 9
    with raises(ValueError, "`layers` must be", "from 0 to 1", "layers=[2]"):
        attention_maps(lm, text, layers=[2])
    with raises(ValueError, "`heads` must be", "from 0 to 3", "heads=[-5]"):
        attention_maps(lm, text, heads=[-5])


@pytest.mark.same_everywhere
def test_what_has_no_scores():
    lm = make_lm(make_variant("retention"))
    with raises(ValueError, "No layer of the model has weights", "Retention"):
        attention_scores(lm, [1, 2])
    with raises(ValueError, "`text` must be one string", "list"):
        attention_scores(lm, [[1, 2], [3, 4]])
    with raises(TypeError, "`lm` must be a `blocks.CausalLM`"):
        attention_maps(lm.backbone, [1, 2])
