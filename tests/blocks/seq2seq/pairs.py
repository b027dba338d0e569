"""Small encoder-decoder models, their inputs, and the tokens they give without a cache."""

import functools

import keras
import keras_hub
import numpy as np
from keras import ops

from blocks import CustomSeq2SeqBackbone, Seq2SeqLM, Seq2SeqLMPreprocessor
from tests.helpers import to_numpy
from tests.models import SMALL_SIZES

SIZES = {
    "vocabulary_size": 40,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 16,
    "intermediate_dim": 24,
    "max_sequence_length": 24,
    "max_source_length": 9,
}
SOURCES = [[3, 4, 5, 6, 7, 8, 9], [5, 6], [9, 8, 7, 6]]
TARGETS = [[1], [1, 2, 3], [1, 5]]


@keras.saving.register_keras_serializable(package="tests")
class Speech(CustomSeq2SeqBackbone):
    """Reads features, of which a convolution makes half as many positions."""

    def source_inputs(self):
        mask = keras.Input((None,), dtype="int32", name="features_padding_mask")
        features = keras.Input((None, 5), name="features")
        return {"features": features, "features_padding_mask": mask}

    def embed_source(self, inputs):
        mask = ops.cast(inputs["features_padding_mask"], "bool")
        x = inputs["features"] * ops.cast(mask, "float32")[..., None]
        stem = keras.layers.Conv1D(16, 2, strides=2, padding="same", name="stem")
        return stem(x), mask[:, ::2]

    def create_encoder_position_embedding(self):
        return None


def make_lm(cls=CustomSeq2SeqBackbone, sampler="greedy", preprocessor=None, **sizes):
    """A model whose tokens vary, and whose sources decide on them."""
    backbone = cls(**{**SIZES, **sizes}, tie_word_embeddings=False)
    rng = np.random.default_rng(2)
    for weight in backbone.weights:
        if len(weight.shape) > 1:
            scale = 1.0 if weight.path.endswith("/embeddings") else 0.25
            weight.assign(rng.normal(size=weight.shape) * scale)
    lm = Seq2SeqLM(backbone, preprocessor, generation_sizes=SMALL_SIZES)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler=sampler)
    return lm


def make_text_lm(**kwargs):
    """A small model of bytes, which begins with 2 and ends with 1."""
    preprocessor = Seq2SeqLMPreprocessor(
        keras_hub.tokenizers.ByteTokenizer(lowercase=False),
        encoder_sequence_length=9,
        decoder_sequence_length=16,
        end_token=1,
        decoder_start_token=2,
    )
    return make_lm(preprocessor=preprocessor, vocabulary_size=256, **kwargs)


def given(rows=slice(None)):
    """The inputs of `generate`: sources and the beginnings of targets."""
    return {"encoder_token_ids": SOURCES[rows], "decoder_token_ids": TARGETS[rows]}


def features():
    """Features of different lengths, and their mask."""
    lengths = np.array([8, 5, 3])
    x = np.random.default_rng(0).normal(size=(3, 8, 5)).astype("float32")
    mask = (np.arange(8) < lengths[:, None]).astype("int32")
    return {"features": x, "features_padding_mask": mask}


def one(row):
    """A row as a batch without padding, with its mask."""
    return {"token_ids": np.array([row]), "padding_mask": np.ones((1, len(row)), int)}


def inputs_of(source, target):
    """The model's inputs for one row of tokens."""
    sides = {"encoder": one(source), "decoder": one(target)}
    return {f"{side}_{name}": x for side, y in sides.items() for name, x in y.items()}


def logits_of(lm, source, target):
    """The logits of each place, by a call on all tokens, without a cache."""
    return to_numpy(lm(inputs_of(source, target)))[0]


@functools.cache
def _greedy(lm, source, target, count):
    row = list(target)
    for _ in range(count):
        row.append(int(logits_of(lm, source, row)[-1].argmax()))
    return row


def greedy(lm, count, sources=SOURCES, targets=TARGETS):
    """Each row continued by the likeliest tokens, without a cache."""
    rows = zip(sources, targets)
    return [_greedy(lm, tuple(a), tuple(b), count) for a, b in rows]


def rows_of(outputs):
    """The real tokens of what `generate` returns."""
    tokens, mask = outputs["decoder_token_ids"], outputs["decoder_padding_mask"]
    return [row[real].tolist() for row, real in zip(tokens, mask)]
