"""Blocks with any norm, or none: what `create_norm` may return."""

import keras
import numpy as np
import pytest

from blocks import CausalLM, CustomBackbone, DynamicTanh
from blocks.layers.norms import ZeroCenteredRMSNormalization
from tests.helpers import assert_close, to_numpy
from tests.models import (
    PACKAGE,
    RAGGED,
    check_generation,
    make_backbone,
    make_lm,
    prompts,
)

pytestmark = pytest.mark.same_everywhere

# Norms, and the names of their weights.
NORMS = {
    "without_bias": (lambda: keras.layers.LayerNormalization(center=False), {"gamma"}),
    "dynamic_tanh": (DynamicTanh, {"alpha", "bias", "scale"}),
    "none": (keras.layers.Identity, set()),
}


@keras.saving.register_keras_serializable(package=PACKAGE)
class NormBackbone(CustomBackbone):
    def __init__(self, norm, **kwargs):
        self.norm = norm
        super().__init__(**kwargs)

    def create_norm(self, inputs_shape, layer_index):
        return NORMS[self.norm][0]()

    def create_final_norm(self):
        return NORMS[self.norm][0]()

    def get_config(self):
        return {**super().get_config(), "norm": self.norm}


@pytest.mark.parametrize("norm", ["without_bias", "dynamic_tanh", "none"])
@pytest.mark.slow
def test_generation_and_presets(norm, tmp_path):
    backbone = make_backbone(NormBackbone, norm=norm)
    block = backbone.transformer_layers[0]
    for layer in (block.attention_norm, block.ffn_norm, backbone.layer_norm):
        assert {w.name for w in layer.weights} == NORMS[norm][1]
    lm = make_lm(backbone)
    check_generation(lm)
    lm.save_to_preset(str(tmp_path / "preset"))
    restored = CausalLM.from_preset(str(tmp_path / "preset"))
    assert_close(restored(prompts(RAGGED)), to_numpy(lm(prompts(RAGGED))))


def test_the_formula_of_dynamic_tanh():
    layer, rng = DynamicTanh(alpha_init=0.7), np.random.default_rng(0)
    x = rng.normal(scale=3, size=(2, 3, 5)).astype("float32")
    assert_close(layer(x), np.tanh(0.7 * x))
    alpha, scale, bias = 1.3, rng.normal(size=5), rng.normal(size=5)
    layer.alpha.assign(alpha)
    layer.scale.assign(scale)
    layer.bias.assign(bias)
    assert_close(layer(x), scale * np.tanh(alpha * x) + bias)


def test_norms_in_low_precision():
    layer = DynamicTanh(dtype="mixed_bfloat16")
    y = layer(np.ones((1, 2, 4), "float32"))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(layer.scale.dtype) == "float32"


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_a_zero_centered_scale_keeps_its_digits(dtype):
    layer = ZeroCenteredRMSNormalization(epsilon=0.5, dtype=dtype)
    x = 2.0 ** np.arange(-2, 2)[None]
    layer.build(x.shape)
    # Its sum with 1 has too many digits for bfloat16.
    layer.scale.assign(np.full(4, 2.0**-9))
    expected = x / np.sqrt(np.mean(x**2) + 0.5) * (1 + 2.0**-9)
    y = layer(x.astype("float32"))
    rounded = keras.ops.cast(expected.astype("float32"), layer.compute_dtype)
    assert_close(keras.ops.cast(y, "float32"), keras.ops.cast(rounded, "float32"))
