"""Runs of a small model on several simulated devices, each in a process of its own.

    KERAS_BACKEND=jax XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python -m tests.blocks.distributed_runs equal

`test_distribution.py` starts them.
"""

import sys
import warnings

import keras
import numpy as np
from keras.distribution import DataParallel, DeviceMesh, ModelParallel

from attention import Mamba2, RotaryAttention
from blocks import CausalLM, CustomBackbone, MixtureOfExperts, Muon, make_layout_map


@keras.saving.register_keras_serializable(package="distributed_runs")
class Backbone(CustomBackbone):
    """Attention of fewer key/value heads than devices, a recurrence, and experts."""

    def create_attention_layer(self, inputs_shape, layer_index):
        if layer_index:
            return Mamba2(self.num_heads, state_dim=8)
        return RotaryAttention(self.num_heads, num_key_value_heads=2)

    def create_ffn(self, inputs_shape, layer_index):
        if layer_index:
            return super().create_ffn(inputs_shape, layer_index)
        return MixtureOfExperts(4, 24, shared_intermediate_dim=16)


def make_model(num_layers=2, rank=None):
    keras.utils.set_random_seed(0)
    backbone = Backbone(64, num_layers, 4, 32, 64, learned_positions=False)
    lm = CausalLM(backbone)
    if rank is not None:
        lm.enable_lora(rank, target="all")
    # Adam would divide the differences of rounding by their own size.
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    lm.compile(optimizer, sampler="greedy")
    return lm


def make_muon_model():
    lm = make_model()
    lm.compile(Muon(lm, 0.01, epsilon=1.0), sampler="greedy")
    return lm


def data():
    lengths = np.array([[12], [9], [2], [12], [1], [12], [7], [4]])
    mask = (np.arange(12) < lengths).astype("int32")
    tokens = np.random.default_rng(0).integers(1, 60, mask.shape) * mask
    return {"token_ids": tokens.astype("int32"), "padding_mask": mask}


def fit(lm, epochs=3, **kwargs):
    x = data()
    options = {"batch_size": 8, "shuffle": False, "verbose": 0, **kwargs}
    return lm.fit(x, x["token_ids"], epochs=epochs, **options).history["loss"]


def randomize(lm):
    """Makes weights large enough for outputs to vary, the same ones in any layout."""
    for i, weight in enumerate(lm.weights):
        if len(weight.shape) > 1:
            draw = np.random.default_rng(i).normal
            weight.assign(draw(0, 0.1, weight.shape))


def outputs(lm):
    logits = np.array(lm.predict(data(), batch_size=8, verbose=0))
    prompts = [[1, 2, 3, 4], [7, 8], [9], [5, 5, 5]] * 2
    found = lm.generate(prompts, max_new_tokens=8, stop_token_ids=None)
    return logits, np.array(found["token_ids"])


def distribute(make, shape):
    """Sets the distribution on as many devices as `shape` says."""
    keras.distribution.set_distribution(None)
    devices = keras.distribution.list_devices()[: np.prod(shape)]
    if len(shape) == 1:
        return keras.distribution.set_distribution(DataParallel(devices=devices))
    mesh = DeviceMesh(shape, ("batch", "model"), devices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout_map = make_layout_map(make, mesh)
    divided = ModelParallel(layout_map=layout_map, batch_dim_name="batch")
    return keras.distribution.set_distribution(divided)


def equal(name="make_model", *shapes):
    """Compares data parallel, model parallel and both with one device."""
    make, results = globals()[name], {}
    shapes = [tuple(map(int, x.split("x"))) for x in shapes or ("8", "1x4", "2x4")]
    for shape in [None, *shapes]:
        if shape is not None:
            distribute(make, shape)
        lm = make()
        randomize(lm)
        losses = fit(lm)
        logits, tokens = outputs(lm)
        weights = [np.array(weight) for weight in lm.trainable_weights]
        results[shape] = [losses, logits, *weights]
        divided = [not w.value.sharding.is_fully_replicated for w in lm.weights]
        assert sum(divided) > 10 if len(shape or ()) > 1 else not any(divided)
        if shape is None:
            expected = tokens
        np.testing.assert_array_equal(tokens, expected)
        differ = [
            np.abs(np.array(a) - b).max() for a, b in zip(results[shape], results[None])
        ]
        print(
            shape, sum(divided), "divided", *(f"{x:.1e}" for x in differ[:2]), end=" "
        )
        print(f"{max(differ[2:]):.1e}", flush=True)
        assert max(differ) < 1e-5, differ
        assert losses[-1] < losses[0] - 0.1


def save(folder):
    """Trains on 8 devices and saves the state: of the optimizer, too."""
    distribute(make_model, (2, 4))
    lm = make_model()
    randomize(lm)
    checkpoint = keras.callbacks.OrbaxCheckpoint(f"{folder}/state")
    fit(lm, epochs=2, callbacks=[checkpoint])
    before = outputs(lm)
    np.savez(f"{folder}/expected.npz", *before, fit(lm, epochs=2))


def load(folder, *shape):
    """Loads it on other devices, and goes on."""
    # One device, too: the file says where each part was, unless there is a layout.
    distribute(make_model, tuple(map(int, shape)))
    lm = make_model()
    lm.optimizer.build(lm.trainable_variables)
    lm.load_weights(f"{folder}/state")
    logits, tokens = outputs(lm)
    found = [logits, tokens, fit(lm, epochs=2)]
    with np.load(f"{folder}/expected.npz") as expected:
        for a, name in zip(found, expected.files):
            np.testing.assert_allclose(a, expected[name], atol=1e-5)


if __name__ == "__main__":
    {"equal": equal, "save": save, "load": load}[sys.argv[1]](*sys.argv[2:])
    print("done")
