"""`JsonTokenizer`: the ids of transformers, wherever KerasHub's tokenizers work."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from blocks import CausalLM, CausalLMPreprocessor, JsonTokenizer
from blocks.generation.outputs import TextPieces
from tests.helpers import raises, to_numpy
from tests.made_tokenizers import HARD_TEXTS, byte_level, metaspace, word_piece
from tests.models import EagerLM, make_backbone, make_lm

pytestmark = pytest.mark.same_everywhere

KINDS = pytest.mark.parametrize("make", [byte_level, metaspace])
INVALID = b"\xff\xfe ok \xf0\x9f\x98"
BYTES = [*(text.encode() for text in HARD_TEXTS), INVALID]


def preprocessor_of(make, start=None, **kwargs):
    arguments = {"sequence_length": 16, "end_token": "<|end|>", **kwargs}
    return CausalLMPreprocessor(JsonTokenizer(make(start)), **arguments)


def prompt_ids(preprocessor, texts):
    encoded = preprocessor.generate_preprocess(texts, sequence_length=200)
    mask = to_numpy(encoded["padding_mask"]).astype(bool)
    return [row[m].tolist() for row, m in zip(to_numpy(encoded["token_ids"]), mask)]


@KINDS
def test_ids_are_those_of_transformers(make, tmp_path):
    transformers = pytest.importorskip("transformers")
    for start in (None, "<s>"):
        path = tmp_path / "tokenizer.json"
        path.write_text(make(start), encoding="utf-8")
        reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        texts = [x.decode(errors="replace") for x in BYTES]
        expected = [reference(text)["input_ids"] for text in texts]
        tokenizer = JsonTokenizer(path)
        assert tokenizer.vocabulary_size() == len(reference)
        assert tokenizer.detokenize(expected) == [*map(reference.decode, expected)]
        preprocessor = CausalLMPreprocessor(tokenizer, end_token="<|end|>")
        # But for a second start token.
        expected = [ids[1:] if ids[:2] == [1, 1] else ids for ids in expected]
        expected = [ids[1:] if ids[:2] == [0, 0] else ids for ids in expected]
        assert prompt_ids(preprocessor, BYTES) == expected


@KINDS
def test_all_ways_in_give_the_same_ids(make):
    tokenizer = JsonTokenizer(make())
    expected = tokenizer(BYTES)
    assert tokenizer(np.array(BYTES, object)) == expected
    assert tokenizer(tf.constant(BYTES)) == expected
    assert [to_numpy(tokenizer(x)).tolist() for x in BYTES] == expected
    data = tf.data.Dataset.from_tensor_slices(BYTES)
    (batch,) = data.batch(len(BYTES)).map(tokenizer)
    assert batch.to_list() == expected
    assert [x.numpy().tolist() for x in data.map(tokenizer)] == expected
    one = expected[2]
    assert tokenizer.detokenize(one) == HARD_TEXTS[2]
    assert tokenizer.detokenize(keras.ops.array([one])) == [HARD_TEXTS[2]]
    if make is byte_level:
        assert tokenizer.detokenize(expected[:-1]) == HARD_TEXTS


def test_vocabulary():
    tokenizer = JsonTokenizer(byte_level("<s>"))
    assert (tokenizer.start_token_id, tokenizer.end_token_id) == (0, None)
    tokens = tokenizer.get_vocabulary()
    assert len(tokens) == tokenizer.vocabulary_size() == 600
    assert [tokenizer.token_to_id(token) for token in tokens] == [*range(600)]
    assert tokenizer.id_to_token(1) == "<|end|>"
    for call in (
        lambda: tokenizer.id_to_token(600),
        lambda: tokenizer.id_to_token(-1),
        lambda: tokenizer.token_to_id("<none>"),
        lambda: JsonTokenizer().vocabulary_size(),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize(
    ("value", "kind", "part"),
    [
        (3, TypeError, "tokenizer_json=3"),
        ('{"model": 1', ValueError, "damaged"),
        ("{}", ValueError, "damaged"),
        ("nothing.json", FileNotFoundError, "nothing.json"),
    ],
)
def test_what_is_no_tokenizer(value, kind, part):
    with raises(kind, part):
        JsonTokenizer(value)


def test_a_file_with_several_start_tokens():
    content = json.loads(byte_level("<s>"))
    steps = content["post_processor"]["single"]
    content["post_processor"]["single"] = [steps[0], *steps]
    with raises(ValueError, "puts 2 tokens before"):
        JsonTokenizer(json.dumps(content))


@pytest.mark.parametrize(
    ("start", "texts"),
    [
        (None, {"a": [67, 1], "": [1]}),
        ("<s>", {"a": [0, 67, 1], "<s>a": [0, 67, 1], "<s><s>": [0, 0, 1], "": [0, 1]}),
    ],
)
def test_samples_begin_as_the_file_says(start, texts):
    preprocessor = preprocessor_of(byte_level, start, sequence_length=5)
    data = tf.data.Dataset.from_tensor_slices([*texts])
    one_by_one = data.map(preprocessor).batch(len(texts))
    batched = data.batch(len(texts)).map(preprocessor)
    for x, _, _ in (preprocessor([*texts]), *one_by_one, *batched):
        mask = to_numpy(x["padding_mask"]).astype(bool)
        rows = zip(to_numpy(x["token_ids"]), mask)
        assert [row[real].tolist() for row, real in rows] == [*texts.values()]


@KINDS
def test_pieces_of_a_stream_are_whole_characters(make):
    preprocessor = preprocessor_of(make)
    text = "a 🤖 👩‍👩‍👧 é 中文!"
    (ids,) = preprocessor.tokenizer([text])
    assert len(ids) > 2 * len(text)
    stream = TextPieces(1, preprocessor)
    pieces = [stream.add([np.array([token])])[0] for token in ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("make, end", [(metaspace, "<|end|>"), (word_piece, "[SEP]")])
def test_new_text_has_the_space_before_it(make, end):
    # These decoders write none where a text begins.
    preprocessor = CausalLMPreprocessor(JsonTokenizer(make()), 16, end_token=end)
    lm = make_lm(make_backbone(num_layers=1, vocabulary_size=600), preprocessor)
    *_, word = preprocessor.tokenizer(["is the"])[0]
    options = {"max_new_tokens": 3, "logit_bias": {word: 1e4}}
    assert lm.generate("this is", **options) == "this is the the the"
    with lm.serve(max_rows=1, max_length=32) as server:
        for new, stop in ((" the the the", None), ("", " the")):
            options["stop"] = stop
            found = [
                lm.generate("this is", strip_prompt=True, **options),
                "".join(lm.stream("this is", strip_prompt=True, **options)),
                lm.start("this is").generate(**options),
                server.submit("this is", **options).result().text,
            ]
            assert found == [new] * 4
    answer = lm.generate("this is", return_logprobs=0, **options)
    assert answer[:3] == ("this is", pytest.approx([]), "stop")


@pytest.mark.slow
def test_training_and_generation():
    backbone = make_backbone(num_layers=1, vocabulary_size=600)
    lm = EagerLM(backbone, preprocessor_of(byte_level, "<s>"))
    lm.compile(optimizer="adam", sampler="greedy")
    lm.fit(["some text", "中文", "🤖"], batch_size=2, verbose=0)
    texts = ["the text", "🤖"]
    outputs = lm.generate(texts)
    assert all(output.startswith(text) for output, text in zip(outputs, texts))
    assert "".join(lm.stream(texts[1])) == outputs[1]


def test_files(tmp_path):
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    preprocessor = preprocessor_of(
        byte_level, "<s>", stop_token_ids=[1, 2], chat_template=template
    )
    lm = make_lm(make_backbone(num_layers=1, vocabulary_size=600), preprocessor)
    lm.save_to_preset(str(tmp_path / "preset"))
    lm.save(tmp_path / "lm.keras")
    assert (tmp_path / "preset/assets/tokenizer/tokenizer.json").exists()
    for restored in (
        CausalLM.from_preset(str(tmp_path / "preset")).preprocessor,
        keras.models.load_model(tmp_path / "lm.keras").preprocessor,
    ):
        assert type(restored.tokenizer) is JsonTokenizer
        assert restored.get_config() == preprocessor.get_config()
        assert restored.stop_token_ids == (1, 2)
        assert prompt_ids(restored, BYTES) == prompt_ids(preprocessor, BYTES)
        assert (
            restored.apply_chat_template([{"role": "user", "content": "a"}]) == "<s>a"
        )


def test_a_saved_config_reads_no_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level())
    config = {**JsonTokenizer().get_config(), "tokenizer_json": str(path)}
    with raises(ValueError, "no vocabulary yet"):
        JsonTokenizer.from_config(config).vocabulary_size()
