"""Other parts in a trained model: what is kept, adapted and new."""

import keras
import numpy as np
import pytest

from blocks import CausalLM
from blocks.models.llama import LlamaBackbone
from tests.helpers import raises, to_numpy
from tests.models import make_backbone, prompts, randomize

pytestmark = pytest.mark.same_everywhere

LLAMA = {"vocabulary_size": 30, "learned_positions": False, "num_key_value_heads": 2}
EMBEDDINGS = "token_embedding/embeddings"


@keras.saving.register_keras_serializable(package="test")
class RingLlama(LlamaBackbone):
    def attention_options(self, layer_index):
        return {**super().attention_options(layer_index), "window": 8}


@keras.saving.register_keras_serializable(package="test")
class Headed(CausalLM):
    """A head of its own, whose layer has no name and an argument."""

    def __init__(self, backbone, preprocessor=None, units=30, **kwargs):
        self.units = units
        self.head = keras.layers.Dense(units)
        super().__init__(backbone, preprocessor, **kwargs)

    def compute_logits(self, hidden_states):
        return self.head(hidden_states)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def outputs_of(lm):
    return to_numpy(lm(prompts([[1, 2, 3, 4], [5, 6]])))


def weight_of(lm, path):
    return next(to_numpy(w.value) for w in lm.backbone.weights if w.path == path)


@pytest.fixture(scope="module")
def lm():
    made = CausalLM(make_backbone(LlamaBackbone, **LLAMA))
    randomize(made)
    return made


def test_all_is_kept_where_only_the_way_of_computing_changes(lm):
    windowed, report = lm.swap(RingLlama)
    # No prompt is longer than the window.
    np.testing.assert_array_equal(outputs_of(windowed), outputs_of(lm))
    assert (report.new, report.dropped, report.adapted) == ([], [], {})


def test_heads_are_averaged_or_copied(lm):
    single, report = lm.swap(num_key_value_heads=1)
    path = "transformer_layer_1/self_attention/value/kernel"
    old, new = weight_of(lm, path), weight_of(single, path)
    np.testing.assert_allclose(new, old.mean(axis=1, keepdims=True), atol=1e-6)
    assert len(report.adapted) == 4 and "averaged into 1" in report.adapted[path]
    # Copied heads compute what the single one does.
    back, report = single.swap(num_key_value_heads=4)
    np.testing.assert_allclose(outputs_of(back), outputs_of(single), atol=1e-5)


def test_tokens_are_kept(lm):
    old = weight_of(lm, EMBEDDINGS)
    fewer, report = lm.swap(vocabulary_size=15)
    np.testing.assert_array_equal(weight_of(fewer, EMBEDDINGS), old[:15])
    assert report.adapted == {EMBEDDINGS: "the first 15 of 30 tokens kept"}
    more, report = lm.swap(vocabulary_size=32)
    mean = np.tile(old.mean(axis=0), (2, 1))
    found = weight_of(more, EMBEDDINGS)
    np.testing.assert_allclose(found, np.concatenate([old, mean]), atol=1e-6)
    assert "30 tokens kept, 2 more" in report.adapted[EMBEDDINGS]


def test_other_sizes_are_new(lm):
    before = outputs_of(lm)
    half = lm.backbone.intermediate_dim // 2
    narrow, report = lm.swap(intermediate_dim=half)
    names = [x.split("/")[-2] for x in report.new]
    assert names == ["gate", "intermediate", "output"] * 2 and not report.adapted
    randomize(narrow)
    np.testing.assert_array_equal(outputs_of(lm), before)
    with raises(TypeError, "`backbone_class`", "LlamaBackbone"):
        lm.swap(keras.Model)


def test_a_head_of_ones_own_is_kept():
    lm = Headed(make_backbone(LlamaBackbone, **LLAMA), units=7)
    lm.enable_lora(2)
    randomize(lm)
    swapped, report = lm.swap()
    assert len(report.kept) == len(swapped.weights)
    np.testing.assert_allclose(outputs_of(swapped), outputs_of(lm), atol=1e-5)
