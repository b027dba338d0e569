"""Generation by encoder-decoder models: what each row gives without a cache."""

import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from attention.contract import describe
from blocks import DraftModel, GenerationSizes, PromptLookup, Seq2SeqLM
from tests.blocks.seq2seq.pairs import (
    SOURCES,
    TARGETS,
    Speech,
    features,
    given,
    greedy,
    logits_of,
    make_lm,
    make_text_lm,
    one,
    rows_of,
)
from tests.helpers import assert_close, raises, slow, to_numpy
from tests.models import make_backbone
from tests.models import make_lm as make_decoder

FREE = {"stop_token_ids": None, "max_new_tokens": 7}


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def text_lm():
    return make_text_lm()


def test_rows_of_different_lengths(lm):
    expected = greedy(lm, 7)
    assert len({*expected[0][-7:], *expected[1][-7:], *expected[2][-7:]}) > 4
    assert rows_of(lm.generate(given(), **FREE)) == expected
    for row in range(3):
        alone = lm.generate(given(slice(row, row + 1)), **FREE)
        assert rows_of(alone) == expected[row : row + 1]
    single = {"encoder_token_ids": SOURCES[0], "decoder_token_ids": TARGETS[0]}
    out = lm.generate(single, **FREE)
    assert out["decoder_token_ids"].tolist() == expected[0]


def test_beams_of_different_sources(lm):
    """The best of all continuations of three tokens is found, for each source."""
    wide = make_lm(vocabulary_size=11)
    wide.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=10))
    sources = [[3, 4, 5, 6], [5], [9, 8]]
    found = wide.generate(
        {"encoder_token_ids": sources, "decoder_token_ids": [[1]] * 3},
        stop_token_ids=None,
        max_new_tokens=2,
    )
    for source, row in zip(sources, rows_of(found)):
        first = to_numpy(ops.log_softmax(logits_of(wide, source, [1])[-1]))
        totals = [
            first[i] + to_numpy(ops.log_softmax(logits_of(wide, source, [1, i])[-1]))
            for i in range(11)
        ]
        best = np.unravel_index(np.argmax(totals), (11, 11))
        assert tuple(row[1:]) == tuple(int(x) for x in best)


def test_streams_and_sessions(lm):
    expected = greedy(lm, 7)
    pieces = list(lm.stream(given(), **FREE))
    joined = [np.concatenate(row).tolist() for row in zip(*pieces)]
    assert joined == expected
    session = lm.start(given())
    new = session.generate(**FREE)
    assert [a + b.tolist() for a, b in zip(TARGETS, new)] == expected
    fork = session.fork()
    more = [[7, 2], [3], [11]]
    padded = {"token_ids": more}
    found = session.generate(padded, stop_token_ids=None, max_new_tokens=3)
    longer = [a + b for a, b in zip(expected, more)]
    continued = greedy(lm, 3, targets=longer)
    assert [a + b.tolist() for a, b in zip(longer, found)] == continued
    fork.trim(3)
    again = fork.generate(stop_token_ids=None, max_new_tokens=3)
    assert [x.tolist() for x in again] == [row[-3:] for row in expected]
    fork.rewrite({"token_ids": TARGETS})
    again = fork.generate(**FREE)
    assert [a + b.tolist() for a, b in zip(TARGETS, again)] == expected


def test_loops_of_ones_own_and_scores(lm):
    expected = greedy(lm, 7)
    state = lm.prefill(given(), max_length=12)
    found = []
    for _ in range(7):
        found.append(ops.convert_to_numpy(ops.argmax(state.logits, axis=-1)))
        _, state = lm.decode_step(found[-1], state)
    assert np.stack(found, 1).tolist() == [row[-7:] for row in expected]
    full = {"encoder_token_ids": SOURCES, "decoder_token_ids": expected}
    scores = lm.score(full, batch_size=2)
    for source, row, score in zip(SOURCES, expected, scores):
        likely = to_numpy(ops.log_softmax(logits_of(lm, source, row)))
        assert_close(score, sum(likely[i, x] for i, x in enumerate(row[1:])))


@pytest.mark.parametrize(
    "guesser", ["lookup", slow("encoder and decoder"), slow("decoder")]
)
def test_speculation(lm, guesser):
    made = {
        "lookup": lambda: PromptLookup(num_tokens=3),
        "encoder and decoder": lambda: DraftModel(make_lm(num_layers=1), num_tokens=2),
        "decoder": lambda: DraftModel(
            make_decoder(make_backbone(vocabulary_size=40, num_layers=1)), num_tokens=2
        ),
    }[guesser]()
    found = lm.generate(given(), speculation=made, **FREE)
    assert rows_of(found) == greedy(lm, 7)


@pytest.mark.slow
def test_options_and_several_continuations(lm):
    options = {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.3, **FREE}
    several = lm.generate(given(), num_return_sequences=2, **options)
    flat = {name: x.reshape(6, -1) for name, x in several.items()}
    rows = rows_of(flat)
    assert rows[0] != rows[1]
    steps = len(lm.compiled_steps)
    whole = lm.generate(given(), return_logprobs=2, **options)
    assert [x.token_ids.tolist() for x in whole] == [
        row[len(target) :] for row, target in zip(rows[::2], TARGETS)
    ]
    # The same batch size, and a source of another length: nothing is compiled anew but
    # for the log-probabilities.
    other = {**given(), "encoder_token_ids": [[4, 5, 6], [3], [9] * 8]}
    steps = len(lm.compiled_steps)
    lm.generate(other, return_logprobs=2, **options)
    assert len(lm.compiled_steps) == steps


@pytest.mark.slow
def test_features(lm):
    speech = make_lm(Speech)
    x = {**features(), "decoder_token_ids": TARGETS}
    found = rows_of(speech.generate(x, **FREE))
    for row, (target, length) in enumerate(zip(TARGETS, (8, 5, 3))):
        alone = {name: y[row : row + 1, :length] for name, y in features().items()}
        tokens = list(target)
        for _ in range(7):
            inputs = {f"decoder_{name}": y for name, y in one(tokens).items()}
            tokens.append(int(to_numpy(speech({**alone, **inputs}))[0, -1].argmax()))
        assert found[row] == tokens
    assert len({tuple(row[-7:]) for row in found}) == 3


@pytest.mark.slow
def test_texts(text_lm):
    texts = ["abc", "hello"]
    found = text_lm.generate(texts, max_new_tokens=6)
    sources = [[*map(ord, text), 1] for text in texts]
    expected = greedy(text_lm, 6, sources, [[2], [2]])
    cut = [row[1 : row.index(1) if 1 in row else None] for row in expected]
    tokenizer = text_lm.preprocessor.tokenizer
    assert found == [tokenizer.detokenize([row])[0] for row in cut]
    assert text_lm.generate("abc", max_new_tokens=6) == found[0]
    assert "".join(text_lm.stream("hello", max_new_tokens=6)) == found[1]
    assert text_lm.generate(iter(texts), max_new_tokens=6) == found
    begun = {"encoder_text": texts, "decoder_text": ["xy", "z"]}
    both = text_lm.generate(begun, max_new_tokens=6)
    assert both[0].startswith("xy") and both[1].startswith("z")
    tokens = text_lm.generate(sources, max_new_tokens=6, stop_token_ids=None)
    assert rows_of(tokens) == expected
    data = tf.data.Dataset.from_tensor_slices({"encoder_text": texts}).batch(1)
    assert text_lm.generate(data, max_new_tokens=6) == found
    held = found[0][1:3]
    stopped = text_lm.generate(texts, max_new_tokens=6, stop=held)
    assert stopped[0] == found[0][: found[0].find(held)]


@pytest.mark.same_everywhere
def test_the_encoder_runs_once(monkeypatch):
    lm = make_lm()
    lm.compile(sampler="greedy", run_eagerly=True)
    calls, call = [], lm.encoder.call
    monkeypatch.setattr(
        lm.encoder, "call", lambda *a, **k: calls.append(1) or call(*a, **k)
    )
    lm.generate(given(), num_return_sequences=3, **FREE)
    assert len(calls) == 1
    session = lm.start(given())
    session.generate(**FREE)
    session.fork().generate(**FREE)
    assert len(calls) == 2
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=3), run_eagerly=True)
    lm.generate(given(slice(0, 1)), **FREE)
    assert len(calls) == 3


@pytest.mark.same_everywhere
def test_a_failed_step_loses_no_source(lm, monkeypatch):
    session = lm.start(given())
    engine = lm._engine()
    decode = engine.decode
    monkeypatch.setattr(engine, "decode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.generate(**FREE)
    monkeypatch.setattr(engine, "decode", decode)
    session.rewrite({"token_ids": TARGETS})
    new = session.generate(**FREE)
    assert [a + b.tolist() for a, b in zip(TARGETS, new)] == greedy(lm, 7)


@pytest.mark.same_everywhere
def test_bad_sources(lm, text_lm):
    def refused(error, part, inputs, model=lm):
        with raises(error, part):
            model.generate(inputs, **FREE)

    refused(
        ValueError, "`encoder_token_ids` is missing", {"decoder_token_ids": TARGETS}
    )
    refused(ValueError, "with what targets begin", {"encoder_token_ids": SOURCES})
    two = {**given(), "encoder_token_ids": SOURCES[:2]}
    refused(ValueError, "a source for each of the 3 prompts", two)
    hidden = {**given(), "encoder_padding_mask": np.zeros((3, 7), int)}
    hidden["encoder_token_ids"] = np.ones((3, 7), int)
    refused(ValueError, "Source 0 is all padding", hidden)
    refused(ValueError, "takes no `token_ids`", {**given(), "token_ids": TARGETS})
    refused(ValueError, "no `preprocessor`", "some text")
    refused(
        ValueError,
        "knows 9 positions",
        {**given(), "encoder_token_ids": [[3] * 10] * 3},
    )
    refused(ValueError, "`encoder_sequence_length` of 9", "some long text", text_lm)
    refused(TypeError, "`encoder_text`", {"encoder_text": [1, 2]}, text_lm)
    refused(ValueError, "outside", {**given(), "encoder_token_ids": [[99]] * 3})
    speech = make_lm(Speech)
    flat = {"features": np.ones((3, 8)), "features_padding_mask": np.ones((3, 8))}
    refused(ValueError, "`features`", {**flat, "decoder_token_ids": TARGETS}, speech)
    with raises(TypeError, "`encoder` and `decoder`"):
        Seq2SeqLM(make_backbone())


@pytest.mark.same_everywhere
def test_sizes_of_sources():
    sizes = GenerationSizes()
    found = [sizes.round_up_source(n) for n in (1, 33, 49, 65, 97, 1500)]
    assert found == [32, 48, 64, 96, 128, 1536]
    assert describe(sizes)
