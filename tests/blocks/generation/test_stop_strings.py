"""Stop strings: text ends before them, whatever tokens make them up."""

import numpy as np
import pytest

from blocks import PromptLookup
from tests.models import (
    bpe_preprocessor,
    make_backbone,
    make_letters_lm,
    make_small_lm,
    prompts,
)

# Varied text, the same on each call.
OPTIONS = {"stop_token_ids": None, "max_new_tokens": 24, "temperature": 1.0, "seed": 5}
TEXTS = ["ab", "hello", "the end"]


@pytest.fixture(scope="module")
def lm():
    return make_letters_lm()


@pytest.fixture(scope="module")
def free(lm):
    """The new text of each prompt, without stop strings."""
    return lm.generate(TEXTS, **OPTIONS, strip_prompt=True)


def stops_in(free):
    """For each row a string of three characters that it has, in its second half."""
    return [[text[14:17], "\n\n\n\n"] for text in free]


def cut(text, stops):
    places = [text.find(x) for x in stops if x in text]
    return text[: min(places, default=None)] if places else text


def test_text_ends_before_the_first(lm, free):
    stops = stops_in(free)
    expected = [cut(*pair) for pair in zip(free, stops)]
    assert all(0 < len(x) < len(y) for x, y in zip(expected, free))
    found = lm.generate(TEXTS, **OPTIONS, strip_prompt=True, stop=stops)
    assert found == expected
    whole = lm.generate(TEXTS, **OPTIONS, stop=stops)
    assert whole == [a + b for a, b in zip(TEXTS, expected)]
    # One for all rows; and one for a single prompt.
    assert lm.generate(TEXTS[0], **OPTIONS, stop=stops[0][0]) == whole[0]
    all_of_them = [x for pair in stops for x in pair]
    assert lm.generate(TEXTS, **OPTIONS, stop=all_of_them, strip_prompt=True) == [
        cut(text, all_of_them) for text in free
    ]
    speculated = {"speculation": PromptLookup(4), "stop": stops}
    assert lm.generate(TEXTS, **OPTIONS, **speculated) == whole


def test_a_stop_string_in_the_prompt_does_not_count(lm, free):
    assert lm.generate("ab", **OPTIONS, stop="ab")[:2] == "ab"
    assert "".join(lm.stream("ab", **OPTIONS, stop="ab")).startswith("ab")


def test_streams_hold_back_what_may_become_one(lm, free):
    for text, new, stops in zip(TEXTS, free, stops_in(free)):
        expected = cut(new, stops)
        pieces = list(lm.stream(text, **OPTIONS, stop=stops))
        assert "".join(pieces) == text + expected
        so_far = ""
        for piece in pieces:
            so_far += piece
            assert (text + expected).startswith(so_far)
    both = list(lm.stream(TEXTS, **OPTIONS, stop=stops_in(free), strip_prompt=True))
    expected = [cut(*pair) for pair in zip(free, stops_in(free))]
    assert ["".join(x) for x in zip(*both)] == expected


def test_rows_end_early(lm, free, calls_of):
    from blocks.generation.engine import Engine

    calls = calls_of(Engine, "decode")
    lm.generate(TEXTS[0], **{**OPTIONS, "max_new_tokens": 200}, stop=free[0][2:5])
    # Blocks of 4 steps.
    assert len(calls) <= 3


def test_tokens_end_before_it_too(lm, free):
    rows = [list(text.encode()) for text in TEXTS]
    stops = stops_in(free)
    expected = [len(cut(*pair).encode()) for pair in zip(free, stops)]
    out = lm.generate(prompts(rows), **OPTIONS, stop=stops)
    lengths = [len(row) + n for row, n in zip(rows, expected)]
    assert out["padding_mask"].sum(axis=1).tolist() == lengths
    pieces = list(lm.stream(prompts(rows), **OPTIONS, stop=stops, strip_prompt=True))
    assert [sum(map(len, x)) for x in zip(*pieces)] == expected


def test_completions_say_why_they_ended(lm, free):
    stops = stops_in(free)
    found = lm.generate(TEXTS, **OPTIONS, stop=[stops[0], [], []], return_logprobs=0)
    assert [x.finish_reason for x in found] == ["stop", "length", "length"]
    assert found[0].text == TEXTS[0] + cut(free[0], stops[0])
    assert len(found[0].token_ids) == len(found[0].logprobs.chosen)
    assert bytes(found[0].token_ids.tolist()).decode() == cut(free[0], stops[0])
    first = ord(free[1][0])
    (one,) = lm.generate(
        TEXTS[1:2], max_new_tokens=9, stop_token_ids=first, return_logprobs=0
    )
    assert (one.finish_reason, one.token_ids.tolist()) == ("stop", [first])


def test_sessions_go_on_after_a_stop_string(lm, free):
    stops = stops_in(free)[0]
    expected = cut(free[0], stops)
    session = lm.start(TEXTS[0])
    assert session.generate(**OPTIONS, stop=stops) == expected
    # It has the stop string among its tokens, as the cache does.
    assert bytes(session.tokens[0].tolist()).decode() == TEXTS[0] + expected + stops[0]
    pieces = list(session.stream(**OPTIONS, stop=stops))
    assert stops[0] not in "".join(pieces)


def test_a_token_may_have_characters_of_both():
    lm = make_small_lm(make_backbone(num_layers=1), bpe_preprocessor(40))
    prompt = [[1, 29, 7]]
    out = lm.generate(prompt, **OPTIONS, strip_prompt=True)
    ids = out["token_ids"][0, : OPTIONS["max_new_tokens"]].tolist()
    # The last token of several characters: the stop string begins within it.
    tokenizer = lm.preprocessor.tokenizer
    pieces = [tokenizer.detokenize([x]) for x in ids]
    place = max(i for i, x in enumerate(pieces[:-1]) if len(x) > 1)
    stop = pieces[place][-1] + pieces[place + 1]
    before = "".join(pieces[:place]) + pieces[place][:-1]
    assert "".join(pieces).find(stop) == len(before)
    found = lm.generate(prompt, **OPTIONS, strip_prompt=True, stop=stop)
    assert found["padding_mask"].sum() == place
    tokens = list(lm.stream(prompt, **OPTIONS, strip_prompt=True, stop=stop))
    assert np.concatenate([x[0] for x in tokens]).tolist() == ids[:place]
