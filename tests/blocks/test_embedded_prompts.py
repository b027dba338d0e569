"""Embeddings in the place of tokens: those of the tokens themselves change nothing."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from blocks import CausalLM, CustomBackbone, EmbeddingInputs
from tests.helpers import EAGER, assert_close, raises, to_numpy
from tests.models import PACKAGE, SMALL_SIZES, make_backbone, prompts, rows_of

ROWS = [[3, 4, 5, 6, 7, 8, 9], [5, 6, 7], [11, 12, 13, 14, 15]]
MASK = np.array([[1, 1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]])
FREE = {"stop_token_ids": None, "max_new_tokens": 9}


@keras.saving.register_keras_serializable(package=PACKAGE)
class Embedded(EmbeddingInputs, CustomBackbone):
    pass


@pytest.fixture(scope="module")
def lm():
    made = CausalLM(make_backbone(Embedded), generation_sizes=SMALL_SIZES)
    made.compile(sampler="greedy")
    return made


def given(lm, rows=slice(None)):
    """Prompts in which embeddings take the place of tokens, and others are there."""
    x = prompts(ROWS)
    table = to_numpy(lm.backbone.token_embedding.embeddings)
    found = {
        "token_ids": np.where(MASK, 0, x["token_ids"]),
        "padding_mask": x["padding_mask"],
        "embeddings": table[x["token_ids"]],
        "embedding_mask": MASK,
    }
    return {name: y[rows] for name, y in found.items()}


def new_tokens(outputs, rows=ROWS):
    return [out[len(row) :] for out, row in zip(rows_of(outputs), rows)]


def test_generation(lm):
    expected = new_tokens(lm.generate(prompts(ROWS), **FREE))
    steps = len(lm.compiled_steps)
    assert new_tokens(lm.generate(given(lm), **FREE)) == expected
    if keras.config.backend() != "torch":
        assert {x.step for x in lm.compiled_steps[steps:]} == {"prefill"}
    steps = len(lm.compiled_steps)
    lm.generate(prompts(ROWS), **FREE)
    assert len(lm.compiled_steps) == steps
    changed = {**given(lm), "embeddings": given(lm)["embeddings"][:, ::-1]}
    assert new_tokens(lm.generate(changed, **FREE)) != expected
    alone = {name: x[0, :7] for name, x in given(lm).items()}
    found = lm.generate(alone, **FREE)["token_ids"]
    assert found[7:].tolist() == expected[0]
    pieces = [np.concatenate(x).tolist() for x in zip(*lm.stream(given(lm), **FREE))]
    assert [x[len(row) :] for x, row in zip(pieces, ROWS)] == expected


def test_the_model_itself(lm):
    x = given(lm)
    assert_close(lm(x), lm(prompts(ROWS)))
    # On JAX Keras predicts past `__call__`.
    assert_close(lm.predict(prompts(ROWS), verbose=0), lm(x))
    state = lm.prefill(x, max_length=12)
    ends = [to_numpy(lm(x))[i, len(row) - 1] for i, row in enumerate(ROWS)]
    assert_close(state.logits, np.stack(ends))


def test_sessions(lm):
    session, plain = lm.start(given(lm)), lm.start(prompts(ROWS))
    expected = [plain.generate(**FREE), plain.generate([[1, 2], [3], [4]], **FREE)]
    found = [session.generate(**FREE), session.generate([[1, 2], [3], [4]], **FREE)]
    for new, same in zip(found, expected):
        assert [x.tolist() for x in new] == [x.tolist() for x in same]
    # Back into the prompts, of which a part is processed again.
    for one in (session, plain):
        one.rewrite([row[:-1] for row in ROWS])
    new, same = session.generate(**FREE), plain.generate(**FREE)
    assert [x.tolist() for x in new] == [x.tolist() for x in same]


def test_turns_with_embeddings(lm):
    """Given later, taken back, and kept where a new prompt begins with the same."""

    def new(session):
        return [x.tolist() for x in session.generate(**FREE)]

    def anew(*parts):
        rows = [np.concatenate(x).tolist() for x in zip(*parts)]
        return new_tokens(lm.generate(prompts(rows), **FREE), rows)

    first = [[1, 2], [3], [4, 3, 2]]
    session = lm.start(first)
    found = session.generate(given(lm), **FREE)
    assert [x.tolist() for x in found] == anew(first, ROWS)
    session = lm.start(given(lm))
    session.rewrite(
        {**given(lm), "embedding_mask": np.where(MASK, [[1] * 4 + [0] * 3], 0)}
    )
    session.rewrite(given(lm))
    assert new(session) == anew(ROWS)
    other, session = session, lm.start(given(lm))
    for taken in (2, 1):
        fork = session.fork()
        fork.trim(taken)
        fork.generate(first, max_new_tokens=1, stop_token_ids=None)
        fork.trim(1)
        kept = [row[:-taken] for row in ROWS]
        assert new(fork) == anew(kept, first)
    assert new(session) == anew(ROWS)
    other.rewrite(first)
    assert new(other) == anew(first)
    with lm.serve(max_rows=1, max_length=16) as server:
        alone = {name: x[0] for name, x in given(lm).items()}
        with raises(ValueError, "without embeddings", "token_ids"):
            server.submit(alone)


def test_searches(lm):
    lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    x = given(lm, slice(0, 2))
    expected = new_tokens(lm.generate(prompts(ROWS[:2]), **FREE), ROWS[:2])
    assert new_tokens(lm.generate(x, **FREE), ROWS[:2]) == expected
    with raises(ValueError, "last token of a prompt"):
        lm.generate(given(lm), **FREE)
    lm.compile(sampler="greedy")


@pytest.mark.same_everywhere
def test_training_and_presets(tmp_path):
    lm = CausalLM(make_backbone(Embedded, num_layers=1))
    lm.compile(keras.optimizers.Adam(1e-2), sampler="greedy", run_eagerly=EAGER)
    x, y = given(lm), np.roll(prompts(ROWS)["token_ids"], -1, axis=1)
    expected = lm.evaluate(prompts(ROWS), y, verbose=0)
    assert_close(lm.evaluate(x, y, verbose=0), expected)
    history = lm.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    lm.save_to_preset(str(tmp_path))
    restored = CausalLM.from_preset(str(tmp_path))
    assert_close(restored(x), lm(x))
    assert_close(ops.shape(restored(prompts(ROWS)))[-1], 60)


@pytest.mark.same_everywhere
def test_bad_embeddings(lm):
    x = given(lm)
    with raises(ValueError, "`embeddings` must have the shape (3, 7, 16)"):
        lm.generate({**x, "embeddings": x["embeddings"][..., :3]}, **FREE)
    with raises(ValueError, "`embedding_mask` must have the shape (3, 7)"):
        lm.generate({**x, "embedding_mask": x["embedding_mask"][:, :2]}, **FREE)
    del x["embedding_mask"]
    with raises(ValueError, "`embedding_mask`"):
        lm.generate(x, **FREE)
    with raises(ValueError, "`embedding_mask`"):
        lm(x)
