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
    generated,
    make_backbone,
    make_small_lm,
    make_text_lm,
    prompts,
)


@pytest.fixture(scope="module")
def text_lm():
    # All bytes: what it makes is full of broken and of whole characters.
    return make_text_lm(sequence_length=48, end_token=None)


@pytest.mark.parametrize("strip_prompt", [False, True])
def test_one_prompt(text_lm, strip_prompt):
    options = {"strip_prompt": strip_prompt, "stop_token_ids": None}
    pieces = list(text_lm.stream("räum auf", **options))
    assert "".join(pieces) == text_lm.generate("räum auf", **options)
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
    whole = text_lm.generate(texts, stop_token_ids=None, strip_prompt=True)
    # A stop token ends a row.
    for stops in (None, [whole[0].encode()[4]]):
        options = {"stop_token_ids": stops, "max_new_tokens": 9}
        pieces = list(text_lm.stream(texts, **options))
        assert pieces[0] == texts
        joined = ["".join(row) for row in zip(*pieces)]
        assert joined == text_lm.generate(texts, **options)


def test_tokens_where_there_is_no_preprocessor(lm):
    expected = generated(lm, max_length=13)
    options = {"stop_token_ids": None, "max_length": 13}
    pieces = list(lm.stream(prompts(RAGGED), **options))
    assert [np.concatenate(row).tolist() for row in zip(*pieces)] == expected
    pieces = list(lm.stream(RAGGED[0], **options, strip_prompt=True))
    assert np.concatenate(pieces).tolist() == expected[0][3:]
    assert [len(x) for x in pieces] == [1] * 10


def pieces_of(rows, **options):
    """The pieces of text that rows of bytes give, byte by byte and at the end."""
    tokenizer = keras_hub.tokenizers.ByteTokenizer(**options)
    preprocessor = CausalLMPreprocessor(tokenizer, sequence_length=16)
    pieces = TextPieces(len(rows), preprocessor)
    found = []
    for place in range(max(map(len, rows)) + 1):
        new = [np.array(row[place : place + 1], "int32") for row in rows]
        found.append(pieces.add(new, finished=not any(map(len, new))))
    return [list(row) for row in zip(*found)]


@pytest.mark.parametrize("texts", [["añ€𝄞"], ["é" * 5], ["a?世 é.", "né?"]])
@pytest.mark.parametrize(
    "options", [{}, {"replacement_char": 63}, {"errors": "strict"}]
)
def test_no_character_is_split(texts, options):
    rows = [list(text.encode()) for text in texts]
    for text, found in zip(texts, pieces_of(rows, **options)):
        assert "".join(found) == text
        # Whole characters or nothing, as soon as the last byte is there.
        assert all(len(piece) <= (2 if options else 1) for piece in found)
        assert options or found[-1] == ""


def test_what_may_not_become_a_character_comes_last():
    (found,) = pieces_of([list("\ufffd\ufffd".encode())])
    assert found == [*[""] * 6, "\ufffd\ufffd"]
    (found,) = pieces_of([[97, 0xE2, 0x82]])
    assert found == ["a", "", "", "\ufffd"]


def test_errors_come_at_once(text_lm):
    for options, kind, *words in (
        ({"inputs": "a long prompt", "max_length": 4}, ValueError, "Prompt 0"),
        ({"stop_token_ids": "x"}, TypeError, "`stop_token_ids`"),
        ({"stop_token_ids": [2**40]}, ValueError, "`stop_token_ids`", f"{2**40}"),
        ({"inputs": 3}, TypeError, "`inputs`"),
    ):
        with raises(kind, *words):
            text_lm.stream(**{"inputs": "a", **options})
    lm = make_small_lm(text_lm.backbone, text_lm.preprocessor, sampler="beam")
    with raises(ValueError, "BeamSampler", "`stream`"):
        lm.stream("a")
