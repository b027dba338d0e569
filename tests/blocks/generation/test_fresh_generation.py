"""Generation is never stale: training, loading, LoRA, quantization, other samplers."""

from typing import NamedTuple

import keras
import keras_hub
import numpy as np
import pytest

from blocks import CustomBackbone
from tests.models import (
    RAGGED,
    brute_force_greedy,
    check_generation,
    make_backbone,
    make_lm,
    make_small_lm,
    prompts,
    randomize,
    rows_of,
    to_numpy,
)


@pytest.fixture(scope="module")
def training_lm():
    return make_lm(make_backbone(num_layers=1))


def fit(lm, **kwargs):
    tokens = np.tile(np.arange(20, 32, dtype="int32"), (4, 1))
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((4, 11), "int32")}
    lm.fit(x, tokens[:, 1:], verbose=0, **kwargs)


class FreshSnapshots(keras.callbacks.Callback):
    """Generates after each epoch, as people do to see how it is going."""

    def __init__(self):
        super().__init__()
        self.matches = []

    def on_epoch_end(self, epoch, logs=None):
        x = prompts([[20, 21]])
        outputs = self.model.generate(x, stop_token_ids=None, max_length=8)
        wanted = brute_force_greedy(self.model, [[20, 21]], [8])
        self.matches.append((rows_of(outputs) == wanted, rows_of(outputs)))


def test_generation_sees_each_epoch(training_lm):
    callback = FreshSnapshots()
    fit(training_lm, epochs=3, callbacks=[callback])
    assert [match for match, _ in callback.matches] == [True] * 3
    assert callback.matches[0][1] != callback.matches[-1][1]


def test_generation_after_fit_and_load_weights(training_lm, tmp_path):
    lm = training_lm
    x = prompts(RAGGED)

    def generate():
        return rows_of(lm.generate(x, stop_token_ids=None, max_length=12))

    before = generate()
    lm.save_weights(tmp_path / "before.weights.h5")
    fit(lm, epochs=4)
    assert generate() == brute_force_greedy(lm, RAGGED, [12] * 3)
    assert generate() != before
    lm.load_weights(tmp_path / "before.weights.h5")
    assert generate() == before
    randomize(lm, seed=5)
    assert generate() == brute_force_greedy(lm, RAGGED, [12] * 3)


def test_lora_trains_its_own_weights_only():
    lm = make_lm(make_backbone(num_layers=1))
    check_generation(lm)
    lm.enable_lora(2)
    lm.compile(optimizer=keras.optimizers.Adam(0.1), sampler="greedy")
    names = [w.path for w in lm.trainable_weights]
    assert names
    assert all("lora" in name for name in names)
    before = {w.path: to_numpy(w) for w in lm.weights}
    first = lm.generate(prompts(RAGGED), stop_token_ids=None, max_length=12)
    fit(lm, epochs=6)
    changed = {
        w.path for w in lm.weights if not np.array_equal(before[w.path], to_numpy(w))
    }
    assert changed
    assert all("lora" in path for path in changed)
    check_generation(lm)
    after = lm.generate(prompts(RAGGED), stop_token_ids=None, max_length=12)
    assert rows_of(first) != rows_of(after)


def test_lora_without_a_target():
    backbone = make_backbone(num_layers=1)
    with pytest.raises(ValueError, match="named one of \\['wuery'\\]"):
        backbone.enable_lora(2, target_layer_names=["wuery"])
    backbone = make_backbone(num_layers=1)
    backbone.enable_lora(2, target_layer_names=["intermediate"])
    assert {w.path.split("/")[2] for w in backbone.trainable_weights} == {
        "intermediate"
    }


def test_lora_without_compiling_again():
    lm = make_lm(make_backbone(num_layers=1))
    x = prompts(RAGGED)
    lm.generate(x, stop_token_ids=None, max_length=12)
    lm.backbone.enable_lora(2)
    for weight in lm.backbone.trainable_weights:
        weight.assign(np.full(tuple(weight.shape), 0.5))
    check_generation(lm)


def test_quantization_is_noticed():
    lm = make_lm(make_backbone(num_layers=1))
    check_generation(lm)
    lm.quantize("int8")
    assert any(w.dtype == "int8" for w in lm.weights)
    outputs = lm.generate(prompts(RAGGED), stop_token_ids=None, max_length=12)
    wanted = brute_force_greedy(lm.predict_on_batch, RAGGED, [12] * 3)
    assert rows_of(outputs) == wanted


def test_other_samplers_and_other_settings_are_noticed(training_lm):
    lm = training_lm
    x = prompts(RAGGED)

    def generate():
        return rows_of(lm.generate(x, stop_token_ids=None, max_length=12))

    lm.compile(sampler="greedy")
    greedy = generate()
    lm.compile(sampler=keras_hub.samplers.TopKSampler(k=1))
    assert generate() == greedy
    lm.sampler.k = 40
    lm.sampler.temperature = 50.0
    assert generate() != greedy
    lm.sampler.temperature = 1e-4
    assert generate() == greedy
    lm.compile(sampler="greedy")
    assert generate() == greedy


# === However layers are kept ===


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
@pytest.mark.parametrize("mode", [None, "activations"])
def test_sublayers_in_tuples_and_remat_scopes(mode):
    with keras.RematScope(mode=mode):
        lm = make_small_lm(make_backbone(TupleBackbone, num_layers=1))
    check_generation(lm)
    fit(lm)
    check_generation(lm)
