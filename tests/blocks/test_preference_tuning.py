"""Preference tuning: the margins by the paper's formula, and what training does."""

import keras
import keras_hub
import numpy as np
import pytest

from blocks import CausalLM, CausalLMPreprocessor, CustomBackbone, PreferenceTuning
from tests.helpers import assert_close, raises, slow, to_numpy
from tests.models import log_softmax

PAIRS = {
    "prompts": ["1+1=", "a"],
    "chosen": ["2", "bcd"],
    "rejected": ["33", "x"],
}


def make_lm(dropout=0.0):
    keras.utils.set_random_seed(0)
    preprocessor = CausalLMPreprocessor(
        keras_hub.tokenizers.ByteTokenizer(), 10, start_token=2, end_token=1
    )
    backbone = CustomBackbone(256, 1, 2, 16, 32, dropout=dropout)
    lm = CausalLM(backbone, preprocessor)
    lm.compile(sampler="greedy")
    return lm


def answers(lm):
    """Returns the log-probability of each answer, one token at a time."""
    found = []
    for side in ("chosen", "rejected"):
        for prompt, text in zip(PAIRS["prompts"], PAIRS[side]):
            tokens = [2, *prompt.encode(), *text.encode(), 1]
            ids = np.array([tokens[:-1]])
            x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
            scores = log_softmax(to_numpy(lm(x)))[0]
            start = len(tokens) - len(text) - 1
            steps = range(start, len(tokens))
            found.append(sum(scores[i - 1, tokens[i]] for i in steps))
    return np.array(found).reshape(2, 2)


@pytest.mark.parametrize("lora", [True, slow(False)])
def test_margins_and_training(lora):
    lm = make_lm()
    before = answers(lm)
    text = lm.generate("1+1=", max_length=9)
    if lora:
        lm.enable_lora(4, "all")
    tuning = PreferenceTuning(lm, beta=0.5)
    assert (tuning.reference is None) == lora
    # Tracing on TensorFlow takes far longer than a few steps.
    eager = keras.config.backend() == "tensorflow"
    tuning.compile(keras.optimizers.Adam(0.05), run_eagerly=eager)
    loss, accuracy = tuning.evaluate(PAIRS, verbose=0)
    assert loss == pytest.approx(np.log(2), rel=1e-5) and accuracy == 0
    losses = tuning.fit(PAIRS, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.5
    change = answers(lm) - before
    assert_close(
        tuning.predict(PAIRS, verbose=0), 0.5 * (change[0] - change[1]), atol=1e-3
    )
    loss, accuracy = tuning.evaluate(PAIRS, verbose=0)
    margins = 0.5 * (change[0] - change[1])
    assert loss == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-2)
    assert accuracy == 1
    # What is generated is not stale.
    assert lm.generate("1+1=", max_length=9) != text


@pytest.mark.slow
def test_only_what_is_trained_changes():
    lm = make_lm(dropout=0.5)
    reference = lm.swap()[0]
    lm.backbone.token_embedding.trainable = False
    weights = [w.path for w in lm.trainable_weights]
    tuning = PreferenceTuning(lm, reference)
    assert [w.path for w in tuning.trainable_weights] == weights
    fixed = [to_numpy(w) for w in reference.weights]
    embeddings = to_numpy(lm.backbone.token_embedding.embeddings)
    tuning.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    tuning.fit(PAIRS, verbose=0, validation_data=PAIRS)
    for weight, value in zip(reference.weights, fixed):
        np.testing.assert_array_equal(to_numpy(weight), value)
    found = to_numpy(lm.backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(found, embeddings)


def test_errors():
    lm = make_lm()
    with raises(TypeError, "`lm`", "CausalLM"):
        PreferenceTuning(lm.backbone)
    with raises(ValueError, "`beta`", "-1"):
        PreferenceTuning(lm, beta=-1)
    with raises(ValueError, "preprocessor"):
        PreferenceTuning(CausalLM(lm.backbone))
    tuning = PreferenceTuning(lm)
    with raises(TypeError, "`prompts`, `chosen` and `rejected`"):
        tuning.preprocess({"prompts": ["a"]})
    with raises(ValueError, "2 prompts, 1 chosen"):
        tuning.preprocess({**PAIRS, "chosen": ["2"]})
