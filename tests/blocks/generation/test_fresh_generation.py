"""Generation is never stale: training, loading, LoRA, quantization, other samplers."""

from typing import NamedTuple

import keras
import numpy as np
import pytest

from blocks import CustomBackbone
from tests.helpers import slow
from tests.models import (
    RAGGED,
    brute_force_greedy,
    check_generation,
    generated,
    make_backbone,
    make_lm,
    make_small_lm,
    randomize,
    to_numpy,
)


@pytest.fixture
def lm():
    return make_lm(make_backbone(num_layers=1))


def fit(lm, **kwargs):
    tokens = np.tile(np.arange(20, 32, dtype="int32"), (4, 1))
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((4, 11), "int32")}
    lm.fit(x, tokens[:, 1:], verbose=0, **kwargs)


def test_generation_sees_each_epoch_and_what_is_loaded(lm, tmp_path):
    found = [check_generation(lm)]
    lm.save_weights(tmp_path / "before.weights.h5")

    class Snapshots(keras.callbacks.Callback):
        """Generates after each epoch, as people do to see how it is going."""

        def on_epoch_end(self, epoch, logs=None):
            found.append(check_generation(self.model))

    fit(lm, epochs=3, callbacks=[Snapshots()])
    fit(lm, epochs=4)
    found.append(check_generation(lm))
    assert len(found) == 5
    assert found[0] != found[1] != found[3]
    lm.load_weights(tmp_path / "before.weights.h5")
    assert check_generation(lm) == found[0]
    randomize(lm, seed=5)
    assert check_generation(lm) != found[0]


@pytest.mark.slow
def test_lora_trains_its_own_weights_only(lm):
    first = check_generation(lm)
    lm.enable_lora(2)
    for weight in lm.trainable_weights:
        weight.assign(np.full(tuple(weight.shape), 0.5))
    # Before it is compiled again, too.
    second = check_generation(lm)
    lm.compile(optimizer=keras.optimizers.Adam(0.1), sampler="greedy")
    before = [to_numpy(w) for w in lm.weights]
    fit(lm, epochs=6)
    changed = {
        w.path for w, x in zip(lm.weights, before) if not np.array_equal(x, to_numpy(w))
    }
    assert changed
    assert all("lora" in path for path in changed)
    assert first != second != check_generation(lm)


def test_lora_without_a_target():
    backbone = make_backbone(num_layers=1)
    with pytest.raises(ValueError, match="has one of \\['wuery'\\]"):
        backbone.enable_lora(2, target_layer_names=["wuery"])
    backbone = make_backbone(num_layers=1)
    backbone.enable_lora(2, target_layer_names=["intermediate"])
    names = {w.path.split("/")[2] for w in backbone.trainable_weights}
    assert names == {"intermediate"}


@pytest.mark.slow
def test_quantization_is_noticed(lm):
    check_generation(lm)
    lm.quantize("int8")
    assert any(w.dtype == "int8" for w in lm.weights)
    wanted = brute_force_greedy(lm.predict_on_batch, RAGGED, 12)
    assert generated(lm, max_length=12) == wanted


class Kernels(NamedTuple):
    """Sublayers in a named tuple, which is no list that Keras would wrap."""

    inner: keras.layers.Layer
    outer: keras.layers.Layer


class InTuples(keras.layers.Layer):
    def __init__(self, width):
        super().__init__()
        dense = [keras.layers.Dense(width) for _ in range(4)]
        self.kernels = Kernels(*dense[:2])
        self.others = tuple(dense[2:])

    def call(self, x):
        for layer in (*self.kernels, *self.others):
            x = layer(x)
        return x


class TupleBackbone(CustomBackbone):
    def create_ffn(self, inputs_shape, layer_index):
        return InTuples(inputs_shape[-1])


@pytest.mark.xla
@pytest.mark.parametrize("mode", [None, slow("activations")])
def test_sublayers_in_tuples_and_remat_scopes(mode):
    with keras.RematScope(mode=mode):
        lm = make_small_lm(make_backbone(TupleBackbone, num_layers=1))
    check_generation(lm)
    fit(lm)
    check_generation(lm)
