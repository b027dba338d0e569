"""`CausalLM.stream`: pieces that joined are what `generate` returns."""

import keras_hub
import numpy as np
import pytest

from blocks import CausalLMPreprocessor
from blocks.generation.outputs import TextPieces
from tests.helpers import raises
from tests.models import (
    RAGGED,
    bpe_preprocessor,
    byte_preprocessor,
    make_backbone,
    make_small_lm,
    prompts,
    rows_of,
)


@pytest.fixture(scope="module")
def text_lm():
    # All bytes: what it makes is full of broken and of whole characters.
    backbone = make_backbone(num_layers=1, vocabulary_size=256)
    return make_small_lm(
        backbone, byte_preprocessor(sequence_length=48, end_token=None)
    )


@pytest.mark.parametrize("strip_prompt", [False, True])
def test_one_prompt(text_lm, strip_prompt):
    options = {"strip_prompt": strip_prompt, "stop_token_ids": None}
    pieces = list(text_lm.stream("räum auf", **options))
    whole = text_lm.generate("räum auf", **options)
    assert "".join(pieces) == whole
    assert len(pieces) > 10
    assert (pieces[0] == "räum auf") is not strip_prompt


def test_text_of_a_model_with_more_tokens_than_its_tokenizer():
    backbone = make_backbone(num_layers=1, vocabulary_size=90)
    lm = make_small_lm(backbone, bpe_preprocessor())
    options = {"stop_token_ids": None, "max_new_tokens": 20}
    whole = lm.generate("the cat", **options)
    assert "".join(lm.stream("the cat", **options)) == whole
    # None of the new tokens was dropped in making text of them.
    tokens = [int(x) for x in lm.preprocessor.tokenizer("the cat")]
    ids = lm.generate([1, *tokens], **options)["token_ids"]
    assert len(ids) == len(tokens) + 21 and ids.max() < 60
    special = (lm.preprocessor.start_token_id, lm.preprocessor.end_token_id)
    kept = [int(x) for x in ids if x not in special]
    assert lm.preprocessor.tokenizer.detokenize([kept])[0] == whole


def test_several_prompts(text_lm):
    texts = ["a", "bcd and more", "ef"]
    options = {"stop_token_ids": None, "max_new_tokens": 9}
    pieces = list(text_lm.stream(texts, **options))
    assert ["".join(row) for row in zip(*pieces)] == text_lm.generate(texts, **options)
    assert pieces[0] == texts


def test_a_stop_token_ends_a_row(text_lm):
    texts = ["a", "bcd"]
    whole = text_lm.generate(texts, stop_token_ids=None, strip_prompt=True)
    stop = whole[0].encode()[4]
    options = {"stop_token_ids": [stop]}
    pieces = list(text_lm.stream(texts, **options))
    assert ["".join(row) for row in zip(*pieces)] == text_lm.generate(texts, **options)


def test_tokens_where_there_is_no_preprocessor():
    lm = make_small_lm(make_backbone(num_layers=1))
    options = {"stop_token_ids": None, "max_length": 13}
    expected = rows_of(lm.generate(prompts(RAGGED), **options))
    pieces = list(lm.stream(prompts(RAGGED), **options))
    assert [np.concatenate(row).tolist() for row in zip(*pieces)] == expected
    pieces = list(lm.stream(RAGGED[0], **options, strip_prompt=True))
    assert np.concatenate(pieces).tolist() == expected[0][3:]
    assert [len(x) for x in pieces] == [1] * 10


class Scripted:
    """A preprocessor whose tokens are bytes of UTF-8."""

    def generate_postprocess(self, x):
        rows = zip(x["token_ids"], x["padding_mask"])
        return [
            bytes(t[m].astype("uint8")).decode("utf-8", errors="replace")
            for t, m in rows
        ]


@pytest.mark.parametrize("text", ["añ€𝄞", "\ufffd" * 2, "é" * 5])
def test_no_character_is_split(text):
    pieces = TextPieces(1, Scripted())
    found = [
        pieces.add([np.array([byte], "int32")], finished=False)[0]
        for byte in text.encode()
    ]
    found.append(pieces.add([np.zeros((0,), "int32")], finished=True)[0])
    assert "".join(found) == text
    # Whole characters or nothing, as soon as the last byte is there.
    assert all(len(piece) <= 1 for piece in found[:-1])
    assert found[-1] == (text if "\ufffd" in text else "")


def test_bytes_that_never_become_a_character_come_last():
    pieces = TextPieces(1, Scripted())
    assert pieces.add([np.array([97, 0xE2, 0x82], "int32")], finished=False) == ["a"]
    assert pieces.add([np.zeros((0,), "int32")], finished=True) == ["\ufffd"]


@pytest.mark.parametrize("options", [{"replacement_char": 63}, {"errors": "strict"}])
def test_other_ways_to_decode_bytes(options):
    tokenizer = keras_hub.tokenizers.ByteTokenizer(**options)
    preprocessor = CausalLMPreprocessor(tokenizer, sequence_length=16)
    texts = ["a?世 é.", "né?"]
    pieces = TextPieces(2, preprocessor)
    rows = [list(text.encode()) for text in texts]
    found = []
    for place in range(max(map(len, rows)) + 1):
        new = [np.array(row[place : place + 1], "int32") for row in rows]
        found.append(pieces.add(new, finished=not any(map(len, new))))
    assert ["".join(row) for row in zip(*found)] == texts
    # As soon as they are there.
    assert all(len(piece) <= 2 for both in found for piece in both)


def test_errors_come_at_once(text_lm):
    with raises(ValueError, "Prompt 0", "max_length"):
        text_lm.stream("a long prompt", max_length=4)
    with raises(TypeError, "`stop_token_ids`"):
        text_lm.stream("a", stop_token_ids="x")
    with raises(ValueError, "`stop_token_ids`", "vocabulary of 256", f"{2**40}"):
        text_lm.stream("a", stop_token_ids=[2**40])
    with raises(TypeError, "`inputs`"):
        text_lm.stream(3)
    lm = make_small_lm(
        text_lm.backbone, text_lm.preprocessor, keras_hub.samplers.BeamSampler()
    )
    with raises(ValueError, "BeamSampler", "`stream`"):
        lm.stream("a")
