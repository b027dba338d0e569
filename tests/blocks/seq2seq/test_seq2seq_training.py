"""Training, saving and changing encoder-decoder models."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from blocks import (
    Seq2SeqLM,
    Seq2SeqLMPreprocessor,
    attention_maps,
    attention_scores,
)
from tests.blocks.seq2seq.pairs import (
    Speech,
    features,
    given,
    greedy,
    logits_of,
    make_lm,
    make_text_lm,
    rows_of,
)
from tests.helpers import EAGER, assert_close, raises, to_numpy

PAIRS = {
    "encoder_text": ["abc", "hello", "x", "four"],
    "decoder_text": ["ABC", "HELLO", "X", "FOUR"],
}
FREE = {"stop_token_ids": None, "max_new_tokens": 7}


def compiled(lm, rate=1e-2):
    lm.compile(keras.optimizers.Adam(rate), sampler="greedy", run_eagerly=EAGER)
    return lm


def test_the_loss_is_that_of_the_targets_alone():
    lm = compiled(make_text_lm())
    loss = lm.evaluate(PAIRS, verbose=0, return_dict=True)["loss"]
    losses = []
    for source, target in zip(*PAIRS.values()):
        row = [2, *map(ord, target), 1]
        likely = ops.log_softmax(logits_of(lm, [*map(ord, source), 1], row[:-1]))
        losses += [-to_numpy(likely)[i, x] for i, x in enumerate(row[1:])]
    assert_close(loss, np.mean(losses))


@pytest.mark.slow
def test_fit_learns_what_the_source_says():
    lm = compiled(make_text_lm(num_layers=1), 2e-2)
    history = lm.fit(PAIRS, epochs=40, verbose=0).history
    assert history["loss"][-1] < 0.05 * history["loss"][0]
    assert history["sparse_categorical_accuracy"][-1] == 1
    assert lm.generate(PAIRS["encoder_text"], max_new_tokens=8) == PAIRS["decoder_text"]


@pytest.mark.same_everywhere
def test_kinds_of_data():
    lm = compiled(make_text_lm(num_layers=1))
    x, y, weights = lm.preprocessor(PAIRS)
    assert set(x) == set(lm.input)
    expected = lm.evaluate(PAIRS, verbose=0)
    data = tf.data.Dataset.from_tensor_slices(PAIRS).batch(2)
    assert_close(lm.evaluate(data, verbose=0), expected)
    arrays = {name: to_numpy(value) for name, value in x.items()}
    tokens = lm.evaluate(
        arrays, to_numpy(y), sample_weight=to_numpy(weights), verbose=0
    )
    assert_close(tokens, expected)
    one = lm.evaluate({k: v[:1] for k, v in PAIRS.items()}, verbose=0)
    rows = np.array([1, 0, 0, 0])
    assert_close(lm.evaluate(PAIRS, sample_weight=rows, verbose=0), one)
    assert to_numpy(lm.preprocessor(PAIRS, sample_weight=rows)[2]).sum(axis=1)[1] == 0
    lm.fit(arrays, to_numpy(y), verbose=0)
    with raises(TypeError, "`encoder_text` and `decoder_text`"):
        lm.fit(["only", "sources"], verbose=0)
    wrong = {**arrays, "encoder_token_ids": arrays["encoder_token_ids"] + 999}
    with raises(ValueError, "outside"):
        lm.fit(wrong, to_numpy(y), verbose=0)
    with raises(ValueError, "padded ones"):
        lm({**arrays, "encoder_padding_mask": np.eye(4, 9, dtype="int32")[:, ::-1]})


@pytest.mark.slow
def test_features_are_trained_on():
    lm = compiled(make_lm(Speech, num_layers=1), 2e-2)
    targets = np.array([[1, 7, 8], [1, 9, 7], [1, 8, 8]])
    x = {
        **features(),
        "decoder_token_ids": targets[:, :-1],
        "decoder_padding_mask": np.ones((3, 2), int),
    }
    lm.fit(x, targets[:, 1:], epochs=40, verbose=0)
    found = lm.generate(
        {**features(), "decoder_token_ids": [[1]] * 3},
        stop_token_ids=None,
        max_new_tokens=2,
    )
    assert found["decoder_token_ids"].tolist() == targets.tolist()


@pytest.mark.slow
def test_presets(tmp_path):
    lm = make_text_lm()
    texts = lm.generate(PAIRS["encoder_text"], max_new_tokens=6)
    lm.save_to_preset(str(tmp_path / "preset"))
    restored = Seq2SeqLM.from_preset(str(tmp_path / "preset"))
    restored.compile(sampler="greedy")
    assert restored.generate(PAIRS["encoder_text"], max_new_tokens=6) == texts
    assert restored.preprocessor.encoder_sequence_length == 9
    lm.save(str(tmp_path / "whole.keras"))
    loaded = keras.models.load_model(str(tmp_path / "whole.keras"))
    assert loaded.generate(PAIRS["encoder_text"], max_new_tokens=6) == texts


@pytest.mark.slow
def test_lora_and_int8():
    lm = make_lm()
    before = greedy(lm, 7)
    lm.enable_lora(2)
    paths = {weight.path for weight in lm.trainable_weights}
    assert any("cross_attention/query" in path for path in paths)
    assert any("encoder_layer_1/self_attention" in path for path in paths)
    rng = np.random.default_rng(0)
    for weight in lm.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    changed = rows_of(lm.generate(given(), **FREE))
    assert changed != before
    merged = lm.merge_lora()
    merged.compile(sampler="greedy")
    assert rows_of(merged.generate(given(), **FREE)) == changed
    merged.quantize("int8")
    found = rows_of(merged.generate(given(), **FREE))
    alone = rows_of(merged.generate(given(slice(1, 2)), **FREE))
    assert found[1:2] == alone


@pytest.mark.same_everywhere
def test_preprocessors():
    tokenizer = keras_hub.tokenizers.ByteTokenizer(lowercase=False)
    made = Seq2SeqLMPreprocessor(
        tokenizer, 6, 5, start_token=3, end_token=1, decoder_start_token=[2, 3]
    )
    x, y, weights = made({"encoder_text": ["abcdefg", "a"], "decoder_text": ["A", ""]})
    found = {name: to_numpy(value).tolist() for name, value in x.items()}
    assert found["encoder_token_ids"] == [[3, 97, 98, 99, 100, 1], [3, 97, 1, 0, 0, 0]]
    assert found["decoder_token_ids"] == [[2, 3, 65, 1, 0], [2, 3, 1, 0, 0]]
    assert to_numpy(y).tolist() == [[3, 65, 1, 0, 0], [3, 1, 0, 0, 0]]
    assert to_numpy(weights).astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    prompts = made.generate_preprocess(["ab"])
    assert to_numpy(prompts["decoder_token_ids"]).tolist() == [[2, 3, 0, 0, 0]]
    tokens = {"decoder_token_ids": np.array([[2, 3, 72, 105, 1, 0]])}
    tokens["decoder_padding_mask"] = np.array([[1, 1, 1, 1, 1, 0]])
    assert made.generate_postprocess(tokens) == ["Hi"]
    again = Seq2SeqLMPreprocessor.from_config(made.get_config())
    assert again.get_config() == made.get_config()
    with raises(ValueError, "decoder_start_token"):
        Seq2SeqLMPreprocessor(tokenizer, decoder_start_token=999)


@pytest.mark.same_everywhere
def test_preprocessors_of_keras_hub():
    vocabulary = ["[PAD]", "[START]", "[END]", "[UNK]", *"abcdefgh"]
    tokenizer = keras_hub.tokenizers.WordPieceTokenizer(
        vocabulary, oov_token="[UNK]", special_tokens=vocabulary[:4]
    )
    for i, name in enumerate(("pad", "start", "end")):
        setattr(tokenizer, f"{name}_token_id", i)
    made = keras_hub.models.Seq2SeqLMPreprocessor(tokenizer, 9, 12)
    lm = make_lm(preprocessor=made)
    texts = lm.generate(["a b c", "d"], max_new_tokens=4)
    lm.preprocessor = None
    tokens = rows_of(
        lm.generate(
            {
                "encoder_token_ids": [[1, 4, 5, 6, 2], [1, 7, 2]],
                "decoder_token_ids": [[1], [1]],
            },
            stop_token_ids=2,
            max_new_tokens=4,
        )
    )
    assert len(texts) == 2
    for text, row in zip(texts, tokens):
        known = [x for x in row if 2 < x < len(vocabulary)]
        assert tokenizer.detokenize(known) == text or max(row) >= len(vocabulary)


@pytest.mark.same_everywhere
def test_scores_and_pictures():
    pytest.importorskip("matplotlib")
    lm = make_text_lm()
    pair = {"encoder_text": "abcd", "decoder_text": "AB"}
    scores = attention_scores(lm, pair)
    shapes = {name: x.shape for name, x in scores.items()}
    assert shapes["encoder_layer_0/self_attention"] == (1, 4, 5, 5)
    assert shapes["transformer_layer_1/self_attention"] == (1, 4, 3, 3)
    assert shapes["transformer_layer_1/cross_attention"] == (1, 4, 3, 5)
    assert_close(
        scores["transformer_layer_1/cross_attention"].sum(-1), np.ones((1, 4, 3))
    )
    figure = attention_maps(lm, pair, layers=[-1], heads=[0])
    axis = figure.axes[0]
    assert len(axis.get_xticklabels()) == 5 and len(axis.get_yticklabels()) == 3
