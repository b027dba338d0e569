"""`CausalLM` over functional models that users write themselves."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import PositionEmbedding, RotaryAttention
from blocks import CausalLM
from tests.helpers import Shift, raises
from tests.models import (
    PACKAGE,
    VOCABULARY_SIZE,
    check_generation,
    generated,
    make_small_lm,
    randomize,
)

pytestmark = pytest.mark.same_everywhere


@keras.saving.register_keras_serializable(package=PACKAGE)
class LogitsLM(CausalLM):
    def compute_logits(self, hidden_states):
        return hidden_states


def token_input(name="token_ids"):
    return keras.Input((None,), dtype="int32", name=name)


INPUTS = {
    "tensor": token_input,
    "list": lambda: [token_input()],
    "tokens": lambda: {"token_ids": token_input()},
    "both": lambda: {n: token_input(n) for n in ("token_ids", "padding_mask")},
}


def make_model(kind="tensor", logits=False):
    inputs = INPUTS[kind]()
    tokens = keras.tree.flatten(inputs)[-1]
    embedding = keras.layers.ReversibleEmbedding(
        VOCABULARY_SIZE, 16, name="token_embedding"
    )
    x = embedding(tokens)
    x = x + PositionEmbedding(64)(x)
    attend = RotaryAttention(4, 2)
    x = Shift()(x + attend(x))
    x = x + attend(keras.layers.LayerNormalization()(x))
    if logits:
        x = keras.layers.Dense(VOCABULARY_SIZE)(x)
    model = keras.Model(inputs, x)
    randomize(model)
    return model


def make_own(kind="tensor", logits=False):
    lm = (LogitsLM if logits else CausalLM)(make_model(kind, logits))
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy")
    return lm


@pytest.mark.parametrize(
    "kind, logits",
    [("tensor", False), ("list", True), ("tokens", True), ("both", False)],
)
@pytest.mark.slow
def test_ragged_prompts_equal_brute_force(kind, logits):
    check_generation(make_own(kind, logits), max_length=20)


@pytest.mark.slow
def test_it_learns_and_is_saved(tmp_path):
    lm = make_own()
    tokens = np.tile(np.arange(1, 9, dtype="int32"), (8, 1))
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((8, 7), "int32")}
    losses = lm.fit(x, tokens[:, 1:], epochs=10, batch_size=8, verbose=0)
    assert losses.history["loss"][-1] < 0.8 * losses.history["loss"][0]
    expected = check_generation(lm)
    lm.backbone.save(tmp_path / "backbone.keras")
    restored = make_small_lm(keras.models.load_model(tmp_path / "backbone.keras"))
    lm.save(tmp_path / "lm.keras")
    for other in (restored, keras.models.load_model(tmp_path / "lm.keras")):
        assert generated(other, max_length=12) == expected


def test_tokens_are_checked_against_the_logits():
    with raises(ValueError, "Token 60", "vocabulary of 60"):
        generated(make_own(), [[1, 60]], max_length=4)


class Subclassed(keras.Model):
    def call(self, x):
        return x


def embedded(*shapes, **kwargs):
    inputs = [keras.Input(shape, dtype="int32", **kwargs) for shape in shapes]
    x = keras.layers.Embedding(8, 4)(inputs[0])
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, x)


def with_names(*names):
    inputs = {name: token_input(name) for name in names}
    return keras.Model(inputs, keras.layers.Embedding(8, 4)(inputs[names[0]]))


A_DICT = "a dict of `token_ids`"
ANY_SIZE = "any batch size and length"


@pytest.mark.parametrize(
    "make, kind, parts",
    [
        (lambda: "gpt", TypeError, ["another Keras model", "backbone='gpt'"]),
        (Subclassed, TypeError, ["must be a functional", "keras.Model(inputs, out"]),
        (keras.Sequential, TypeError, ["must be a functional"]),
        (lambda: embedded((None,), (None,)), TypeError, ["token ids alone", "list("]),
        (lambda: with_names("token_ids", "x"), TypeError, [A_DICT, "'x'"]),
        (lambda: with_names("tokens"), TypeError, [A_DICT]),
        (lambda: embedded((8,)), ValueError, [ANY_SIZE, "(None, 8)"]),
        (lambda: embedded((None,), batch_size=2), ValueError, [ANY_SIZE, "(2, None)"]),
        (
            lambda: keras.Sequential(
                [token_input(), keras.layers.Embedding(8, 4), keras.layers.Flatten()]
            ),
            TypeError,
            ["one tensor of shape (batch, length, dim)"],
        ),
        (
            lambda: embedded((None,)),
            TypeError,
            [
                'name="token_embedding"',
                "override `compute_logits(hidden_states)`",
                "logits already",
                "token_embedding=None",
            ],
        ),
    ],
)
def test_models_that_can_not_be_a_backbone(make, kind, parts):
    with raises(kind, "`backbone`", *parts):
        CausalLM(make())


def test_a_head_that_returns_no_logits():
    class Pooled(CausalLM):
        def compute_logits(self, hidden_states):
            return ops.mean(hidden_states, axis=1)

    with raises(TypeError, "`Pooled.compute_logits` must return logits"):
        Pooled(make_model())


def test_what_only_kerashub_backbones_can_do(tmp_path):
    lm = make_own()
    with raises(TypeError, "`enable_lora(rank)` of the layers"):
        lm.enable_lora(2)
    with raises(TypeError, '`save("model.keras")`', "Nothing was written"):
        lm.save_to_preset(str(tmp_path / "preset"))
    assert not (tmp_path / "preset").exists()
