"""The check of encoder-decoder models passes right ones, and names what is wrong."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from attention import GroupedQueryAttention
from attention.testing import ConformanceError
from blocks import CustomSeq2SeqBackbone, Seq2SeqLM
from blocks.testing import check_seq2seq_lm
from tests.blocks.seq2seq.pairs import SIZES, Speech
from tests.helpers import raises
from tests.models import SMALL_SIZES

SMALL = {**SIZES, "num_layers": 1, "max_source_length": 12}


def maker(backbone=CustomSeq2SeqBackbone, task=Seq2SeqLM):
    def make():
        return task(backbone(**SMALL), generation_sizes=SMALL_SIZES)

    return make


def test_a_right_model():
    report = check_seq2seq_lm(
        maker(), max_new_tokens=4, checks=["source", "ragged_batch"]
    )
    assert set(report) == {"source", "ragged_batch"}
    assert max(report.values()) < 1e-3


@pytest.mark.slow
def test_all_checks_pass_on_right_models():
    assert len(check_seq2seq_lm(maker(), max_new_tokens=4)) == 11
    mask = np.arange(8) < np.array([8, 3, 5, 8])[:, None]
    x = np.random.default_rng(0).normal(size=(4, 8, 5)).astype("float32")
    sources = {"features": x, "features_padding_mask": mask.astype("int32")}
    checks = ["source", "causality", "encoder_once", "ragged_batch", "beam"]
    check_seq2seq_lm(maker(Speech), sources=sources, max_new_tokens=4, checks=checks)


class Unmasked(CustomSeq2SeqBackbone):
    """The mask of sources is forgotten."""

    def embed_source(self, inputs):
        x, mask = super().embed_source(inputs)
        return x, ops.ones_like(mask)


class Blind(CustomSeq2SeqBackbone):
    """Decoders get nothing of what encoders return."""

    def transform(self, x, padding_mask, encoder_sequence, encoder_padding_mask):
        nothing = keras.layers.Rescaling(0.0)(encoder_sequence)
        return super().transform(x, padding_mask, nothing, encoder_padding_mask)


class Seer(CustomSeq2SeqBackbone):
    """The targets' tokens see later ones."""

    def create_attention_layer(self, inputs_shape, layer_index, causal=True):
        return GroupedQueryAttention(4, 4, causal=False)


class Again(Seq2SeqLM):
    """Runs the whole model for each new token."""

    def generate(self, inputs, max_new_tokens=None, **options):
        x = {name: np.array(value) for name, value in inputs.items()}
        for _ in range(max_new_tokens):
            new = ops.convert_to_numpy(ops.argmax(self(x)[:, -1:], axis=-1))
            for name, more in zip(self.target_names, (new, np.ones_like(new))):
                x[name] = np.concatenate([x[name], more], axis=1)
        return {name: x[name] for name in self.target_names}


class Mixed(Seq2SeqLM):
    """Beams have the sources of other rows."""

    def split_inputs(self, inputs):
        sources, prompts = super().split_inputs(inputs)
        if isinstance(self.sampler, keras_hub.samplers.BeamSampler):
            sources = {name: np.roll(x, 1, axis=0) for name, x in sources.items()}
        return sources, prompts


class Swapped(Seq2SeqLM):
    """All rows of a batch get the source of the first."""

    def split_inputs(self, inputs):
        sources, prompts = super().split_inputs(inputs)
        return {name: x[[0] * len(x)] for name, x in sources.items()}, prompts


FAULTS = {
    "source": (Unmasked, Seq2SeqLM, "mask of a source hides must not count"),
    "source ": (Blind, Seq2SeqLM, "does not attend to its source"),
    "causality": (Seer, Seq2SeqLM, "Other tokens from position"),
    "encoder_once": (CustomSeq2SeqBackbone, Again, "must run once"),
    "ragged_batch": (CustomSeq2SeqBackbone, Swapped, "in one batch"),
    "beam": (CustomSeq2SeqBackbone, Mixed, "beam"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name):
    backbone, task, part = FAULTS[name]
    with raises(ConformanceError, part) as error:
        check_seq2seq_lm(maker(backbone, task), max_new_tokens=4)
    assert error.value.check == name.strip()


def test_bad_input():
    with raises(TypeError, "`make_lm`"):
        check_seq2seq_lm(Seq2SeqLM(CustomSeq2SeqBackbone(**SMALL)))
    with raises(TypeError, "encoder-decoder language model"):
        check_seq2seq_lm(lambda: 3)
