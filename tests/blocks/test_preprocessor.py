"""`CausalLMPreprocessor`: strings into `fit` and `generate`, with any tokenizer."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from blocks import CausalLMPreprocessor
from tests.helpers import raises, to_numpy
from tests.models import byte_preprocessor, log_softmax, make_backbone, make_lm

pytestmark = pytest.mark.same_everywhere


def word_tokenizer(**kwargs):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "quick", "fox", "##es"]
    return keras_hub.tokenizers.WordPieceTokenizer(
        vocabulary=vocabulary, lowercase=True, **kwargs
    )


def bpe_tokenizer():
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "Ġ": 4, "ab": 5, "Ġa": 6}
    return keras_hub.tokenizers.BytePairTokenizer(
        vocabulary=vocabulary,
        merges=["a b", "Ġ a"],
        unsplittable_tokens=["<s>", "</s>"],
    )


def as_lists(*arrays):
    return [to_numpy(x).astype(int).tolist() for x in arrays]


def words(*args, **kwargs):
    return CausalLMPreprocessor(word_tokenizer(), *args, **kwargs)


def test_samples_are_shifted_and_padding_is_left_out():
    preprocessor = byte_preprocessor(sequence_length=6)
    x, y, sample_weight = preprocessor(["abc", "abcdefghi"])
    tokens, mask = as_lists(x["token_ids"], x["padding_mask"])
    targets, weights = as_lists(y, sample_weight)
    assert tokens == [[97, 98, 99, 1, 0, 0], [97, 98, 99, 100, 101, 102]]
    assert mask == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert targets == [[98, 99, 1, 0, 0, 0], [98, 99, 100, 101, 102, 1]]
    # The end token is learned; nothing is learned after it.
    assert weights == [[1, 1, 1, 0, 0, 0], [1] * 6]


def test_special_tokens_by_name_and_by_id():
    for start, end, pad in (("[CLS]", "[SEP]", 0), (2, np.int64(3), 0)):
        preprocessor = words(6, start_token=start, end_token=end, pad_token_id=pad)
        assert (preprocessor.start_token_id, preprocessor.end_token_id) == (2, 3)
        x, y, _ = preprocessor(["the fox"])
        assert as_lists(x["token_ids"], y) == [
            [[2, 4, 6, 3, 0, 0]],
            [[4, 6, 3, 0, 0, 0]],
        ]
    special = {"start_token": 2, "end_token": 3, "pad_token_id": 7}
    without = words(6, **special, add_start_token=False, add_end_token=False)
    x, _, _ = without(["the fox"])
    assert as_lists(x["token_ids"]) == [[[4, 6, 7, 7, 7, 7]]]


def test_special_tokens_are_those_of_the_tokenizer():
    preprocessor = CausalLMPreprocessor(bpe_tokenizer(), 4)
    assert preprocessor.start_token_id is None
    assert preprocessor.end_token_id is None
    x, y, _ = preprocessor(["ab a"])
    assert as_lists(x["token_ids"], y) == [[[5, 6, 0, 0]], [[6, 0, 0, 0]]]
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "bc": 4}
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        vocabulary=vocabulary, merges=["b c"]
    )
    preprocessor = CausalLMPreprocessor(tokenizer, 5)
    assert preprocessor.end_token_id == preprocessor.start_token_id == 0
    x, _, _ = preprocessor(["ab"])
    assert as_lists(x["token_ids"], x["padding_mask"]) == [
        [[0, 1, 2, 0, 0]],
        [[1, 1, 1, 1, 0]],
    ]


def test_graph_mode_and_batches():
    preprocessor = byte_preprocessor(sequence_length=6)
    texts = ["abc", "abcdefghi", "x"]
    eager = preprocessor(texts)
    dataset = tf.data.Dataset.from_tensor_slices(texts)
    for mapped in (
        dataset.batch(3).map(preprocessor),
        dataset.map(preprocessor).batch(3),
    ):
        batch = next(iter(mapped))
        keras.tree.map_structure(
            lambda a, b: np.testing.assert_array_equal(to_numpy(a), to_numpy(b)),
            tuple(eager),
            tuple(batch),
        )


def test_fit_on_raw_strings():
    preprocessor = byte_preprocessor(sequence_length=12)
    lm = make_lm(make_backbone(num_layers=1, vocabulary_size=256), preprocessor)
    # Tracing on TensorFlow takes far longer than a few steps.
    lm.run_eagerly = keras.config.backend() == "tensorflow"
    texts = ["hello world", "hello keras"] * 4
    first = lm.fit(texts, batch_size=4, epochs=1, verbose=0).history["loss"][0]
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(4).repeat(12)
    last = lm.fit(dataset, epochs=1, verbose=0).history["loss"][0]
    assert last < first
    # The loss is the mean over real targets: the same by hand.
    x, y, weight = preprocessor(texts)
    scores = log_softmax(to_numpy(lm({k: to_numpy(v) for k, v in x.items()})))
    y, weight = to_numpy(y), to_numpy(weight).astype("float64")
    losses = -np.take_along_axis(scores, y[..., None], axis=-1)[..., 0]
    found = lm.evaluate(texts, batch_size=8, verbose=0, return_dict=True)["loss"]
    assert found == pytest.approx((losses * weight).sum() / weight.sum(), rel=1e-3)


def test_prompts_and_back():
    preprocessor = byte_preprocessor(sequence_length=6)
    x = preprocessor.generate_preprocess(["abc", "d"], sequence_length=5)
    tokens, mask = as_lists(x["token_ids"], x["padding_mask"])
    assert tokens == [[97, 98, 99, 0, 0], [100, 0, 0, 0, 0]]
    assert mask == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert preprocessor.generate_postprocess(x) == ["abc", "d"]
    one = preprocessor.generate_preprocess("abc")
    assert to_numpy(one["token_ids"]).shape == (6,)
    assert preprocessor.generate_postprocess(one) == "abc"


def test_special_tokens_are_not_part_of_the_text():
    preprocessor = words(6, start_token="[CLS]", end_token="[SEP]")
    x = preprocessor.generate_preprocess(["the foxes"])
    assert as_lists(x["token_ids"]) == [[[2, 4, 6, 7, 0, 0]]]
    assert preprocessor.generate_postprocess(x) == ["the foxes"]
    ended = {
        "token_ids": np.array([[2, 5, 3, 0], [0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0], [0, 0, 0, 0]]),
    }
    assert preprocessor.generate_postprocess(ended) == ["quick", ""]


def test_config_round_trip():
    special = {"start_token": "[CLS]", "end_token": 3, "pad_token_id": 1}
    preprocessor = words(7, **special, add_start_token=False, name="texts")
    restored = CausalLMPreprocessor.from_config(preprocessor.get_config())
    assert restored.get_config() == preprocessor.get_config()
    assert restored.sequence_length == 7
    assert restored.pad_token_id == 1
    assert restored.add_start_token is False


def test_sequence_length_may_be_set_later():
    preprocessor = byte_preprocessor(sequence_length=6)
    preprocessor(["abc"])
    preprocessor.sequence_length = 4
    x, _, _ = preprocessor(["abcdef"])
    assert as_lists(x["token_ids"]) == [[[97, 98, 99, 100]]]


@pytest.mark.parametrize(
    ("arguments", "kind", "part"),
    [
        ({"start_token": "[END]"}, ValueError, "`start_token='[END]'` is not in"),
        ({"end_token": 8}, ValueError, "end_token=8"),
        ({"stop_token_ids": [3, 8]}, ValueError, "stop_token_ids=8"),
        ({"stop_token_ids": 3}, TypeError, "must be a list of token ids"),
        ({"tokenizer": "gpt2"}, TypeError, "`tokenizer` must be a"),
        ({"tokenizer": word_tokenizer(dtype="string")}, TypeError, 'dtype="int32"'),
        ({"sequence_length": 0}, ValueError, "`sequence_length`"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id=-1"),
    ],
)
def test_wrong_arguments(arguments, kind, part):
    with raises(kind, part):
        CausalLMPreprocessor(**{"tokenizer": word_tokenizer(), **arguments})
