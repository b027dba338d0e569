"""Preference tuning: the margins by the paper's formula, and what training does."""

import keras
import keras_hub
import numpy as np
import pytest

from blocks import (
    BackupAndResume,
    CausalLM,
    CausalLMPreprocessor,
    CustomBackbone,
    PreferenceTuning,
)
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


def test_goes_on_after_a_stop(tmp_path):
    """What `BackupAndResume` does for `CausalLM.fit`."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.stops and batch == 2:
                raise KeyboardInterrupt

    pairs = {name: ["a", "b", "cd", "e", "fg"] for name in PAIRS}
    pairs["chosen"] = ["x", "yz", "x", "xx", "y"]

    def fit(folder, stop=False):
        lm = make_lm(dropout=0.1)
        lm.enable_lora(2)
        tuning = PreferenceTuning(lm)
        tuning.compile("adam", run_eagerly=keras.config.backend() == "tensorflow")
        callback = Stop()
        callback.stops = stop
        backup = BackupAndResume(tmp_path / folder, save_freq=2)
        return tuning.fit(
            pairs, batch_size=1, epochs=2, callbacks=[backup, callback], verbose=0
        ).history["loss"]

    expected = fit("whole")
    with pytest.raises(KeyboardInterrupt):
        fit("stopped", stop=True)
    np.random.random(), keras.random.normal((1,))
    np.testing.assert_allclose(fit("stopped"), expected, rtol=1e-6)
