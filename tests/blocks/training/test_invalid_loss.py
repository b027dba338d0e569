"""A loss that is not finite ends training, before anything is saved."""

import keras
import numpy as np
import pytest

from blocks import CausalLM
from tests.helpers import raises, to_numpy
from tests.models import make_backbone


class WithLosses(CausalLM):
    """A model whose loss is multiplied by the weights of rows."""

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        loss = super().compute_loss(x, y, y_pred, None, training)
        return loss * keras.ops.mean(sample_weight)


def made(cls=WithLosses, **kwargs):
    keras.utils.set_random_seed(0)
    lm = cls(make_backbone(num_layers=1))
    lm.compile(keras.optimizers.SGD(0.01), weighted_metrics=[], **kwargs)
    return lm


def rows(factors):
    tokens = np.ones((len(factors), 4), "int32")
    weights = np.array(factors, "float32")
    return {"token_ids": tokens, "padding_mask": tokens}, tokens, weights


def fit(lm, factors, **kwargs):
    x, y, weights = rows(factors)
    options = {"batch_size": 1, "shuffle": False, "verbose": 0, **kwargs}
    return lm.fit(x, y, sample_weight=weights, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_step_is_named_and_nothing_is_saved(bad, tmp_path):
    path = tmp_path / "model.weights.h5"
    saved = keras.callbacks.ModelCheckpoint(path, save_freq=1, save_weights_only=True)
    lm = made()
    fit(lm, [1.0, 1.0], callbacks=saved)
    good = [to_numpy(x) for x in lm.trainable_weights]
    factors = [bad, 1.0]
    message = f"The loss is {bad} at step 1 of epoch 3"
    with raises(FloatingPointError, message, "learning rate", "global_clipnorm"):
        fit(lm, factors, callbacks=[saved], initial_epoch=2, epochs=4)
    other = made()
    other.load_weights(path)
    for found, expected in zip(other.trainable_weights, good):
        np.testing.assert_array_equal(to_numpy(found), expected)


@pytest.mark.slow
def test_where_no_callback_is_given():
    """There Keras's own run beside the training, and the error comes later."""
    for cls in (WithLosses, CausalLM):
        with raises(FloatingPointError, "at step 4 of epoch 1"):
            fit(made(cls), [1.0, 1.0, 1.0, float("nan"), 1.0, 1.0])
    # Not by the loss of what is held out.
    fit(made(), [1.0], validation_data=rows([float("nan")]))


@pytest.mark.skipif(keras.config.backend() == "torch", reason="Keras has it not there")
def test_several_steps_at_once():
    lm = made(steps_per_execution=2)
    with raises(FloatingPointError, "one of the steps 3 to 4 of epoch 1"):
        fit(lm, [1.0, 1.0, float("nan"), 1.0, 1.0, 1.0])


def test_weights_at_the_end_of_an_epoch(tmp_path):
    """The last loss is finite, and its gradients are not."""

    class Infinite(WithLosses):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            # The derivative of a root at 0.
            kernel = self.backbone.trainable_variables[0].value
            return loss + keras.ops.sqrt(keras.ops.sum(kernel - kernel))

    lm = Infinite(make_backbone(num_layers=1))
    lm.compile(keras.optimizers.SGD(0.01), weighted_metrics=[])
    saved = keras.callbacks.ModelCheckpoint(tmp_path / "model.weights.h5")
    saved.save_weights_only = True
    with raises(FloatingPointError, "is not finite at the end of epoch 1"):
        fit(lm, [1.0], callbacks=[saved])
    assert not list(tmp_path.iterdir())


def test_kerass_own_ends_training_without_an_error():
    lm = made()
    stop = keras.callbacks.TerminateOnNaN()
    history = fit(lm, [float("nan"), 1.0], epochs=3, callbacks=[stop])
    assert len(history.epoch) == 1
    assert np.isnan(history.history["loss"][0])


def test_gradients_that_overflow_are_skipped():
    """With loss scaling they are no error, as the loss is finite."""
    lm = CausalLM(make_backbone(num_layers=1, dtype="mixed_float16"))
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.01), initial_scale=2.0**100
    )
    lm.compile(optimizer, weighted_metrics=[])
    before = [to_numpy(x) for x in lm.trainable_weights]
    fit(lm, [1.0])
    for found, expected in zip(lm.trainable_weights, before):
        np.testing.assert_array_equal(to_numpy(found), expected)
