"""Layouts from what layers declare, and the same results on 8 devices as on one."""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from attention import Retention, declare_axes, declare_role
from attention.contract import axes_of_weights
from blocks import CausalLM, CustomBackbone, MixtureOfExperts, make_layout_map
from tests.attention.testing.test_conformance import LAYERS
from tests.helpers import raises
from tests.models import MixerBackbone, make_backbone

has_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="needs JAX"
)
has_orbax = pytest.mark.skipif(
    importlib.util.find_spec("orbax") is None, reason="needs orbax-checkpoint"
)


def run(*arguments, devices=8):
    """Runs `distributed_runs` on so many simulated devices of JAX."""
    flags = "--xla_backend_optimization_level=0"
    flags += f" --xla_force_host_platform_device_count={devices}"
    result = subprocess.run(
        [sys.executable, "-m", "tests.blocks.distributed_runs", *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip().endswith("done"), result.stderr[-3000:]


@has_jax
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("make_model",), ("make_muon_model", "2x4")])
def test_eight_devices_equal_one(arguments):
    run("equal", *arguments)


@has_jax
@has_orbax
@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_loads_on_one_and_on_four(tmp_path):
    run("save", tmp_path)
    run("load", tmp_path, 1, devices=1)
    run("load", tmp_path, 2, 2, devices=4)


def mesh(*shape):
    # Only names: nothing is laid out here.
    devices = [f"cpu:{i}" for i in range(np.prod(shape))]
    return keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)


def chain(inputs, layer):
    return keras.Model(inputs, layer(inputs))


def layouts(make, *shape):
    return {k: v.axes for k, v in make_layout_map(make, mesh(*shape)).items()}


@pytest.mark.same_everywhere
def test_layers_declare_all_their_weights():
    for name, make in LAYERS.items():
        layer = make()
        chain(keras.Input((3, 24)), layer)
        found = axes_of_weights(layer)
        weights = {weight.path: weight for weight in layer.weights}
        assert {x for x in weights if len(weights[x].shape) > 1} <= set(found), name
        for path, axes in found.items():
            assert axes.shape == tuple(weights[path].shape), path


def test_which_axis_is_divided():
    def make():
        return CausalLM(make_backbone(MixerBackbone, mixer="gqa", num_heads=4))

    # No warning: 2 divides the heads of keys and values, too.
    found = layouts(make, 1, 2)
    block = "transformer_layer_0/"
    assert found["token_embedding/embeddings"] == ("model", None)
    assert found[block + "self_attention/key/kernel"] == (None, "model", None)
    assert found[block + "self_attention/key/bias"] == ("model", None)
    output = block + "self_attention/attention_output/"
    assert found[output + "kernel"] == ("model", None, None)
    assert output + "bias" not in found
    assert found[block + "ffn/intermediate/bias"] == ("model",)
    assert found[block + "ffn/output/kernel"] == ("model", None)
    assert len(found) == 1 + 2 * (3 * 2 + 1 + 2 + 1)


@pytest.mark.same_everywhere
def test_heads_that_do_not_divide_are_whole_and_said():
    def make():
        return MixerBackbone("gqa", **{**sizes, "num_heads": 6})

    sizes = {"vocabulary_size": 64, "num_layers": 2, "hidden_dim": 24}
    sizes["intermediate_dim"] = 32
    with pytest.warns(UserWarning) as said:
        found = layouts(make, 2, 4)
    texts = sorted(str(x.message) for x in said)
    assert len(texts) == 2, texts
    assert "'heads', of 3" in texts[0] and "and 7 others" in texts[0]
    assert "'heads', of 6" in texts[1]
    assert not any("self_attention" in path for path in found)
    assert "transformer_layer_1/ffn/intermediate/kernel" in found


@pytest.mark.same_everywhere
def test_heads_of_flat_projections_are_counted():
    """12 channels of 3 heads: 4 divides the channels, not the heads."""

    def make():
        return chain(keras.Input((None, 12)), Retention(3, name="mix"))

    with pytest.warns(UserWarning, match="'heads', of 3"):
        assert layouts(make, 1, 4) == {}
    assert layouts(make, 1, 3)["mix/query/kernel"] == (None, "model")


@pytest.mark.same_everywhere
def test_experts_are_divided_or_each_of_them():
    def make():
        layer = MixtureOfExperts(6, 8, use_bias=True, name="experts")
        return chain(keras.Input((None, 4)), layer)

    assert layouts(make, 1, 3)["experts/gate_kernels"] == ("model", None, None)
    with pytest.warns(UserWarning, match="'experts', of 6,.* 'experts/output_biases'"):
        found = layouts(make, 1, 4)
    assert found["experts/gate_kernels"] == (None, None, "model")
    assert found["experts/output_kernels"] == (None, "model", None)
    assert found["experts/gate_biases"] == (None, "model")


@pytest.mark.same_everywhere
def test_low_rank_updates_follow_their_weights():
    def make():
        lm = CausalLM(CustomBackbone(64, 1, 4, 16, 32))
        lm.enable_lora(2, target="all")
        return lm

    found = layouts(make, 1, 4)
    block = "transformer_layer_0/"
    assert found[block + "ffn/intermediate/lora_kernel_b"] == (None, "model")
    assert found[block + "ffn/output/lora_kernel_a"] == ("model", None)
    query = block + "self_attention/query/"
    assert found[query + "lora_kernel_a"] == (None, "model", None)
    assert query + "lora_kernel_b" not in found


class Mixer(keras.layers.Layer):
    def build(self, shape):
        self.mix = self.add_weight((4, 4), name="mix")
        self.wq = keras.layers.Dense(8, name="wq")
        self.wq.build(shape)

    def call(self, x):
        return self.wq(x) + self.mix[0, 0]


@pytest.mark.same_everywhere
def test_a_weight_that_nobody_declared_is_an_error():
    layer = Mixer(name="mixer")
    chain(keras.Input((None, 4)), layer)
    message = ("mix (4, 4) of Mixer 'mixer'", "wq/kernel", "declare_role(self.wq")
    with raises(ValueError, *message):
        axes_of_weights(layer)
    declare_role(layer.wq, "query")
    with raises(ValueError, "mix (4, 4)"):
        axes_of_weights(layer)
    declare_axes(layer, {"mix": (None, "heads")})
    assert axes_of_weights(layer)["mixer/mix"].names == (None, "heads")
    declare_axes(layer, {"mix": ("heads",)})
    with raises(ValueError, "mix' of shape (4, 4)", "1 axes"):
        axes_of_weights(layer)
    with raises(ValueError, "`axes`", "mix=('head', None)"):
        declare_axes(layer, {"mix": ("head", None)})


@pytest.mark.same_everywhere
def test_bad_arguments_of_make_layout_map():
    def make():
        dense = declare_role(keras.layers.Dense(4), "query")
        return chain(keras.Input((4,)), dense)

    with raises(TypeError, "`make_model`", "a function"):
        make_layout_map(make(), mesh(1, 2))
    with raises(ValueError, "'tensor'", "('batch', 'model')"):
        make_layout_map(make, mesh(1, 2), model_dim_name="tensor")
    with raises(ValueError, "each time", "dense/kernel", "Name the layers"):
        make_layout_map(make, mesh(1, 2))


@pytest.mark.same_everywhere
def test_nothing_of_the_model_stays():
    """Names and seeds are those that would be without a layout map."""

    def make():
        return CausalLM(CustomBackbone(50, 1, 2, 8, 16))

    keras.utils.set_random_seed(0)
    keras.utils.clear_session()
    expected = make()
    keras.utils.set_random_seed(0)
    keras.utils.clear_session()
    make_layout_map(make, mesh(1, 2))
    lm = make()
    assert lm.optimizer.name == expected.optimizer.name
    for a, b in zip(lm.weights, expected.weights):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
