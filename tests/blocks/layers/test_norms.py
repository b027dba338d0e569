"""Blocks with any norm, or none: what `create_norm` may return."""

import keras
import numpy as np
import pytest

from blocks import CausalLM, CustomBackbone, DynamicTanh
from tests.helpers import assert_close, slow, to_numpy
from tests.models import (
    PACKAGE,
    RAGGED,
    check_generation,
    make_backbone,
    make_lm,
    prompts,
)

NORMS = {
    "layer_norm": keras.layers.LayerNormalization,
    "without_bias": lambda: keras.layers.LayerNormalization(center=False),
    "rms_norm": keras.layers.RMSNormalization,
    "dynamic_tanh": DynamicTanh,
    "none": keras.layers.Identity,
}
# The weights of one norm, by name.
WEIGHTS = {
    "layer_norm": {"beta", "gamma"},
    "without_bias": {"gamma"},
    "rms_norm": {"scale"},
    "dynamic_tanh": {"alpha", "bias", "scale"},
    "none": set(),
}


@keras.saving.register_keras_serializable(package=PACKAGE)
class NormBackbone(CustomBackbone):
    def __init__(self, norm, **kwargs):
        self.norm = norm
        super().__init__(**kwargs)

    def create_norm(self, inputs_shape, layer_index):
        return NORMS[self.norm]()

    def create_final_norm(self):
        return NORMS[self.norm]()

    def get_config(self):
        return {**super().get_config(), "norm": self.norm}


@pytest.mark.parametrize("norm", [*map(slow, list(NORMS)[:3]), *list(NORMS)[3:]])
def test_generation_and_presets(norm, tmp_path):
    backbone = make_backbone(NormBackbone, norm=norm)
    block = backbone.transformer_layers[0]
    for layer in (block.attention_norm, block.ffn_norm, backbone.layer_norm):
        assert {w.name for w in layer.weights} == WEIGHTS[norm]
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
    for weight, value in zip(
        (layer.alpha, layer.scale, layer.bias), (alpha, scale, bias)
    ):
        weight.assign(value)
    assert_close(layer(x), scale * np.tanh(alpha * x) + bias)


def test_norms_in_low_precision():
    layer = DynamicTanh(dtype="mixed_bfloat16")
    y = layer(np.ones((1, 2, 4), "float32"))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(layer.scale.dtype) == "float32"
