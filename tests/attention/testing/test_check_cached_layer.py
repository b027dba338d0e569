"""What the conformance kit says of right layers, of models, and of bad arguments."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    CachedLayer,
    GroupedQueryAttention,
    LatentAttention,
    MultiHeadAttention,
    PositionEmbedding,
    RotaryAttention,
)
from attention.testing import ConformanceError, check_cached_layer, check_cached_model
from tests.helpers import SECRET, Shift, raises

SMALL = {"batch_size": 2, "max_length": 8}


def test_a_layer_without_weights_and_configuration():
    report = check_cached_layer(Shift, **SMALL)
    assert {"cache", "padding", "gradients", "saving"} <= set(report)
    assert all(isinstance(value, float) for value in report.values())


class StepByStep(CachedLayer):
    """A recurrence as it is written first: a loop over the tokens."""

    def build(self, inputs_shape):
        self.decay = self.add_weight(name="decay", shape=inputs_shape[-1:])

    def create_cache(self, batch_size, max_length):
        return {"state": ops.zeros((batch_size, *self.decay.shape), "float32")}

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        start = self.create_cache(ops.shape(x)[0], 1) if cache is None else cache
        state, states = start["state"], []
        for step in range(x.shape[1]):
            decay = ops.sigmoid(ops.cast(self.decay, "float32"))
            new = decay * state + ops.cast(x[:, step], "float32")
            if padding_mask is not None:
                real = ops.cast(padding_mask[:, step : step + 1], "bool")
                new = ops.where(real, new, state)
            state = new
            states.append(state)
        outputs = ops.cast(ops.stack(states, axis=1), self.compute_dtype)
        return outputs if cache is None else (outputs, {"state": state})


def test_a_layer_that_needs_to_know_the_length():
    report = check_cached_layer(StepByStep, **SMALL)
    assert "saving" in report and report["padding"] < 1e-4


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "mixed_float16"])
@pytest.mark.slow
def test_other_dtypes(dtype):
    checks = ["cache", "prefill_and_steps", "padding", "low_precision"]
    report = check_cached_layer(
        lambda: RotaryAttention(4, 2), dtype=dtype, checks=checks, **SMALL
    )
    assert report["prefill_and_steps"] < (1e-4 if dtype == "float64" else 0.3)
    check_cached_layer(
        lambda: LatentAttention(4), dtype=dtype, checks="prefill_and_steps", **SMALL
    )


def test_the_random_seed_and_the_policy():
    before = keras.config.dtype_policy()
    names = ["prefill_and_steps", "compiled"]
    first = check_cached_layer(Shift, checks="low_precision", **SMALL)
    again = check_cached_layer(Shift, checks="low_precision", **SMALL)
    other = check_cached_layer(Shift, checks="low_precision", seed=5, **SMALL)
    assert first == again != other
    assert keras.config.dtype_policy() == before
    with pytest.raises(ConformanceError):
        check_cached_layer(Broken, checks=names, **SMALL)
    assert keras.config.dtype_policy() == before


class Broken(Shift):
    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        if cache is not None and x.shape[1] == 1:
            raise RuntimeError(f"no single tokens, in {self.name}")
        return super().call(x, padding_mask, cache, cache_update_index)


def test_a_layer_that_raises():
    parts = ("RuntimeError", "no single tokens", "called on 1 tokens", "(Broken)")
    with raises(ConformanceError, *parts) as error:
        check_cached_layer(Broken, checks=["rows"], **SMALL)
    assert error.value.check == "rows" and error.value.difference is None
    assert isinstance(error.value.__cause__, RuntimeError)


class Unmaskable(Shift):
    def call(self, x, cache=None, cache_update_index=None):
        return super().call(x, None, cache, cache_update_index)


def test_a_layer_that_takes_no_padding_mask():
    with pytest.raises(ConformanceError, match="has no argument `padding_mask`"):
        check_cached_layer(Unmaskable, **SMALL)
    names = ["state", "rows", "causality", "prefill_and_steps", "gradients"]
    # Some checks only, in their order.
    assert list(check_cached_layer(Unmaskable, checks={*names}, **SMALL)) == names


# === Models ===


def model_of_many_kinds():
    inputs = keras.Input((None, 6))
    attend = MultiHeadAttention(2)
    x = keras.layers.Dense(16)(inputs)
    x = x + PositionEmbedding(8, "random_normal")(x)
    # Keras saves a layer that a nested model shares with the outer one as two.
    nested = keras.Sequential([MultiHeadAttention(2), Shift()])
    x = x + attend(nested(x))
    head, tail = keras.layers.Dense(3)(x), attend(x)
    return keras.Model(inputs, {"head": head, "tail": tail})


@pytest.mark.slow
def test_a_functional_model_with_several_outputs():
    report = check_cached_model(model_of_many_kinds, **SMALL)
    assert "padding" in report and "saving" in report


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embed = keras.layers.Embedding(11, 16)
        self.attend = GroupedQueryAttention(4, 1)

    def call(self, inputs, training=None):
        x = self.embed(inputs["ids"])
        return x + self.attend(x, padding_mask=inputs["mask"])


@pytest.mark.slow
def test_a_subclassed_model():
    example = {"ids": np.arange(10).reshape(1, 10), "mask": np.ones((1, 10), bool)}
    report = check_cached_model(Subclassed, inputs=example, **SMALL)
    assert "padding" in report and "gradients" in report
    with raises(ValueError, "Pass `inputs`"):
        check_cached_model(Subclassed, **SMALL)


# === Arguments ===


ONE = Shift()


def too_short():
    return PositionEmbedding(7)


@pytest.mark.parametrize(
    "arguments, kind, part",
    [
        ({"make_layer": 3}, TypeError, "make_layer=3"),
        ({"make_layer": Shift()}, TypeError, "lambda: MyLayer(4)"),
        (
            {"make_layer": lambda: keras.layers.Dense(3)},
            TypeError,
            "check_cached_model",
        ),
        ({"checks": ["causal"]}, ValueError, "causality"),
        ({"checks": []}, ValueError, "checks=[]"),
        ({"batch_size": 1}, ValueError, "batch_size=1"),
        ({"max_length": 5}, ValueError, "max_length=5"),
        ({"max_length": 0}, ValueError, "max_length=0"),
        ({"hidden_dim": 2.5}, TypeError, "hidden_dim=2.5"),
        ({"make_layer": lambda: ONE}, ValueError, "returned the same object twice"),
        ({"make_layer": too_short}, ValueError, "can represent 7 positions"),
    ],
)
def test_bad_arguments(arguments, kind, part):
    with raises(kind, part):
        check_cached_layer(**{"make_layer": Shift, **arguments})


def fixed_length():
    return keras.Sequential([keras.Input((8, 16)), Shift()])


def integers():
    inputs = keras.Input((None,), dtype="int32", name="ids")
    x = keras.layers.Lambda(lambda t: ops.one_hot(t, 16))(inputs)
    return keras.Model(inputs, Shift()(x))


@pytest.mark.parametrize(
    "make, inputs, kind, parts",
    [
        (lambda: keras.layers.Dense(3), None, TypeError, ["keras.Model"]),
        (fixed_length, None, ValueError, ["keras.Input((None, ...))"]),
        (integers, None, ValueError, ["'ids'", "vocabulary_size"]),
        (integers, np.full((3,), SECRET), ValueError, ["(batch, length, ...)", "(3,)"]),
    ],
)
def test_models_whose_inputs_are_not_known(make, inputs, kind, parts):
    with raises(kind, *parts):
        check_cached_model(make, inputs=inputs, **SMALL)
