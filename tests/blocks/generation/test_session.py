"""Sessions: a turn processes only new tokens, and equals starting over."""

import functools

import keras
import numpy as np
import pytest

from attention import CachedLayer
from blocks import CustomBackbone, PromptLookup
from tests.helpers import raises, slow
from tests.models import (
    brute_force_greedy,
    make_backbone,
    make_small_lm,
    make_text_lm,
    make_variant,
    prompts,
)

PROMPT = [3, 1, 4, 1, 5]


@functools.cache
def shared_lm(kind):
    """One for all tests that leave it as it is, as each is compiled."""
    return make_small_lm(make_variant(kind))


def tokens_of(*rows):
    """A prompt of one row, or a batch."""
    batch = prompts(rows)
    return {key: x[0] for key, x in batch.items()} if len(rows) == 1 else batch


def turn(session, inputs, new, **kwargs):
    return session.generate(inputs, max_new_tokens=new, stop_token_ids=None, **kwargs)


def tokens(session):
    return [row.tolist() for row in session.tokens]


@pytest.mark.parametrize(
    "kind", [slow("mha"), pytest.param("rotary", marks=pytest.mark.xla), slow("leak")]
)
def test_turns_equal_starting_over(kind):
    lm = make_small_lm(make_variant(kind))
    session = lm.start(tokens_of([*PROMPT, 9, 2, 6]))
    assert session.num_prefilled == 8
    first = turn(session, None, 5)
    expected = brute_force_greedy(lm, [[*PROMPT, 9, 2, 6]], 13)
    assert expected == tokens(session) == [[*PROMPT, 9, 2, 6, *first]]
    second = turn(session, tokens_of([5, 3, 5]), 6)
    # The last of the new tokens had not been processed yet.
    assert session.num_prefilled == 8 + 1 + 3
    expected = brute_force_greedy(lm, [[*expected[0], 5, 3, 5]], 22)
    assert tokens(session) == expected
    assert expected[0][-6:] == second.tolist()
    turn(session, None, 3)
    assert session.num_prefilled == 8 + 1 + 3 + 1
    assert tokens(session) == brute_force_greedy(lm, expected, 25)


def test_rows_of_different_lengths(lm):
    session = lm.start(tokens_of(PROMPT, [9], [2, 6]))
    turn(session, None, 3)
    more = {"token_ids": np.array([[7, 8], [7, 0], [0, 0]])}
    more["padding_mask"] = np.array([[1, 1], [1, 0], [0, 0]])
    rows = [row + new for row, new in zip(tokens(session), ([7, 8], [7], []))]
    turn(session, more, 4)
    assert tokens(session) == brute_force_greedy(lm, rows, max_new_tokens=4)


@pytest.mark.slow
def test_a_row_that_got_nothing_goes_on(lm):
    session = lm.start(tokens_of(PROMPT, [9, 2]))
    new = session.generate(max_length=5, stop_token_ids=None)
    assert [len(x) for x in new] == [0, 3]
    session.generate(max_length=9, stop_token_ids=None)
    assert tokens(session) == brute_force_greedy(lm, [PROMPT, [9, 2]], 9)


@pytest.mark.slow
def test_text_and_streams():
    lm = make_text_lm(sequence_length=40)
    session = lm.start("hello")
    pieces = list(session.stream(max_new_tokens=6))
    assert "".join(pieces) == lm.generate("hello", max_new_tokens=6, strip_prompt=True)
    history = session.tokens[0].tolist()
    answer = turn(session, " you", 5)
    x = tokens_of([*history, *b" you"])
    expected = lm.generate(x, max_new_tokens=5, stop_token_ids=None, strip_prompt=True)
    expected = expected["token_ids"][expected["padding_mask"]].tolist()
    assert session.tokens[0].tolist()[-5:] == expected
    assert answer == bytes(expected).decode("utf-8", errors="replace")
    # Up to the preprocessor's `sequence_length` by default, all turns together.
    session.generate(stop_token_ids=None)
    assert len(session.tokens[0]) == 40
    several = lm.start(["ab", "cdef"])
    assert turn(several, ["x", "y"], 4) == [
        turn(lm.start(a), b, 4) for a, b in (("ab", "x"), ("cdef", "y"))
    ]


def test_streams_that_are_not_finished(lm):
    options = {"max_new_tokens": 9, "stop_token_ids": None}
    session = lm.start(tokens_of(PROMPT))
    not_begun, stream = session.stream(**options), session.stream(**options)
    next(stream)
    turn(session, None, 2)
    for earlier in (not_begun, stream):
        with raises(ValueError, "was continued or trimmed", "`fork`"):
            next(earlier)
    stream = session.stream(**options)
    next(stream)
    session.trim(2)
    with raises(ValueError, "was continued or trimmed"):
        next(stream)
    # What was streamed counts, though the rest is never asked for.
    length = len(session.tokens[0])
    stream = session.stream(**options)
    for _ in range(4):
        next(stream)
    del stream
    turn(session, None, 3)
    assert tokens(session) == brute_force_greedy(lm, [PROMPT], length + 7)


@pytest.mark.parametrize("step", ["process", "decode"])
def test_a_step_that_fails_loses_nothing(lm, monkeypatch, step):
    session = lm.start(tokens_of(PROMPT))
    whole = getattr(session._engine, step)

    def failing(*args):
        whole(*args)  # which takes the cache's memory
        raise KeyboardInterrupt

    monkeypatch.setattr(session._engine, step, failing)
    with pytest.raises(KeyboardInterrupt):
        turn(session, tokens_of([4]), 4)
    monkeypatch.undo()
    other = session.fork()
    if step == "decode":
        # The added token and the first new one are there, as before.
        session.trim(2)
    assert tokens(session) == [PROMPT]
    turn(session, None, 4)
    assert tokens(session) == brute_force_greedy(lm, [PROMPT], 9)
    turn(other, None, 1)
    rows = [other.tokens[0][:-1].tolist()]
    assert tokens(other) == brute_force_greedy(lm, rows, max_new_tokens=1)


@pytest.mark.parametrize("kind", ["mha", "rotary", "leak"])
@pytest.mark.slow
def test_forks_do_not_affect_each_other(kind):
    lm = shared_lm(kind)
    session = lm.start(tokens_of(PROMPT))
    forks = [session.fork() for _ in range(3)]
    forks.append(forks[0].fork())
    added = [[7], [8, 9], [10, 11, 12], [13]]
    for fork, more in zip(forks, added):
        turn(fork, tokens_of(more), 4)
    turn(session, None, 4)
    for fork, more in zip(forks, added):
        turn(fork, None, 3)
        row = [*PROMPT, *more]
        assert tokens(fork) == brute_force_greedy(lm, [row], max_new_tokens=7)
        assert fork.num_prefilled == len(row) + 1
    assert tokens(session) == brute_force_greedy(lm, [PROMPT], 9)


@pytest.mark.parametrize("kind", [slow("mha"), "rotary"])
@pytest.mark.parametrize("dropped", [slow(1), 6])
def test_trim(kind, dropped):
    lm = shared_lm(kind)
    session = lm.start(tokens_of(PROMPT))
    turn(session, None, 4)
    left = session.tokens[0].tolist()[:-dropped]
    prefilled = session.num_prefilled
    session.trim(dropped)
    assert tokens(session) == [left]
    turn(session, tokens_of([6, 7]), 5)
    assert tokens(session) == brute_force_greedy(lm, [[*left, 6, 7]], len(left) + 7)
    assert session.num_prefilled == prefilled + 3


def test_what_can_not_be_trimmed(lm):
    other = shared_lm("leak")
    session = other.start(tokens_of(PROMPT))
    turn(session, None, 4)
    with raises(ValueError, "Leak", "can't go back", "from position 8 to 6", "fork"):
        session.trim(2)
    # The last token was not processed yet, but the one before it was.
    turn(session, None, 2)
    assert tokens(session) == brute_force_greedy(other, [PROMPT], 11)
    plain = lm.start(tokens_of([1, 2, 3]))
    with raises(ValueError, "at least one token", "num_tokens=3"):
        plain.trim(3)
    with raises(TypeError, "`num_tokens`"):
        plain.trim(1.5)


def changes_of_weights(folder):
    def load(model):
        model.save_weights(folder / "x.weights.h5")
        model.load_weights(folder / "x.weights.h5")

    x = prompts([[1, 2, 3, 4]])
    return {
        "fit": lambda lm: lm.fit(x, x["token_ids"], verbose=0),
        "train_on_batch": lambda lm: lm.train_on_batch(x, x["token_ids"]),
        "load_weights": load,
        "load_weights of the backbone": lambda lm: load(lm.backbone),
        "set_weights": lambda lm: lm.set_weights(lm.get_weights()),
        "another dtype": lambda lm: setattr(
            lm.backbone.transformer_layers[0].ffn, "dtype_policy", "mixed_bfloat16"
        ),
        "enable_lora": lambda lm: lm.backbone.enable_lora(2),
        "quantize": lambda lm: lm.quantize("int8"),
    }


@pytest.mark.slow
def test_a_changed_model_is_noticed(tmp_path):
    lm = make_small_lm(make_backbone(num_layers=1))
    for name, change in changes_of_weights(tmp_path).items():
        session = lm.start(tokens_of([1, 2, 3]))
        other = session.fork()
        # Compiling changes no weights.
        lm.compile(optimizer="sgd", sampler="greedy")
        turn(session, None, 2)
        before = tokens(session)
        change(lm)
        turns = [functools.partial(turn, x, None, 2) for x in (session, other)]
        for refused in (session.fork, *turns):
            with raises(ValueError, "weights have changed", "`lm.start(...)`"):
                refused()
        assert tokens(session) == before, name


def test_speculation_in_a_session(lm):
    plain, fast = (lm.start(tokens_of([1, 2, 3, 1, 2, 3])) for _ in range(2))
    for more in (None, tokens_of([4, 4])):
        turn(plain, more, 7)
        turn(fast, more, 7, speculation=PromptLookup(3))
    assert tokens(fast) == tokens(plain)


def test_errors_leave_the_session_as_it_was(lm):
    session = lm.start(tokens_of([1, 2, 3]))
    one = {"max_new_tokens": 1}
    for options, parts in (
        ({}, ["`max_new_tokens`"]),
        ({"max_length": 2}, ["3 tokens", "length of 2"]),
        ({"max_new_tokens": 62}, ["64 positions"]),
        ({"max_new_tokens": 0}, ["`max_new_tokens`"]),
        ({"inputs": "text", **one}, ["began with tokens"]),
        ({"inputs": tokens_of([1], [2]), **one}, ["1 rows"]),
        ({"inputs": tokens_of([99]), **one}, ["Token 99"]),
    ):
        with raises(ValueError, *parts):
            session.generate(**{"stop_token_ids": None, **options})
        assert tokens(session) == [[1, 2, 3]]
    turn(session, None, 3)
    assert tokens(session) == brute_force_greedy(lm, [[1, 2, 3]], 6)


def test_a_layer_says_what_it_can_take_back():
    class Ring(CachedLayer):
        """Keeps the last four positions, and says so."""

        def create_cache(self, batch_size, max_length):
            return keras.ops.zeros((batch_size, 4))

        def can_rewind(self, cache, from_index, to_index):
            return from_index == to_index or from_index <= 4

        def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
            return x if cache is None else (x, cache)

    class RingBackbone(CustomBackbone):
        def create_attention_layer(self, inputs_shape, layer_index):
            return Ring()

    session = make_small_lm(make_backbone(RingBackbone)).start(tokens_of([1, 2, 3, 4]))
    session.trim(2)
    turn(session, None, 4)
    with raises(ValueError, "Ring", "can't go back"):
        session.trim(2)
