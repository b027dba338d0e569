"""Requests that join and leave a running batch: each answer is that of `generate` alone."""

import asyncio
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from keras import ops

from blocks import LogitsProcessor, ServerBusy
from blocks.generation.grammar import GrammarMask
from blocks.start_packer import StartPacker
from tests.helpers import raises, to_numpy
from tests.models import (
    generated,
    make_backbone,
    make_letters_lm,
    make_small_lm,
    make_variant,
)

LONG = list(range(1, 45))
# More requests than rows, of many lengths and options.
REQUESTS = [
    ([5, 6, 7], {"max_new_tokens": 9}),
    (LONG, {"max_new_tokens": 5, "repetition_penalty": 1.5}),
    ([8], {"max_new_tokens": 1, "temperature": None, "presence_penalty": None}),
    ([9, 10], {"max_new_tokens": 14, "temperature": 1.3, "top_p": 0.9, "seed": 4}),
    ([11, 12, 13, 14], {"max_new_tokens": 7, "logit_bias": {3: 2.0}}),
    ([3, 1], {"max_new_tokens": 12, "temperature": 0.8, "seed": 2**33, "top_k": 9}),
    ([*LONG[:40], 2, 2], {"max_new_tokens": 6}),
    ([*LONG[:40], 7, 9, 1], {"max_new_tokens": 8, "no_repeat_ngram_size": 2}),
    ([21], {"max_new_tokens": 10, "stop_token_ids": [4, 8, 15, 16, 23, 42]}),
]


def alone(lm, prompt, options):
    options = {"stop_token_ids": None, **options}
    return generated(lm, [prompt], **options)[0][len(prompt) :]


def submit(server, prompt, options):
    return server.submit(prompt, **{"stop_token_ids": None, **options})


@pytest.mark.parametrize(
    "mixer", ["rotary", pytest.param("hybrid", marks=pytest.mark.slow)]
)
def test_each_answer_is_that_of_generate_alone(mixer):
    lm = make_small_lm(make_variant(mixer))
    expected = [alone(lm, *x) for x in REQUESTS]
    with lm.serve(max_rows=3, max_length=64, block_steps=3) as server:
        compiled = len(server.compiled_steps)
        requests = [submit(server, *x) for x in REQUESTS]
        found = [x.result(300).token_ids.tolist() for x in requests]
        assert found == expected
        # Pieces are there after the answer, too.
        for request, tokens in zip(requests, expected):
            assert np.concatenate(list(request)).tolist() == tokens
        # From several threads, in another order: other neighbours.
        again = [None] * len(REQUESTS)

        def ask(i):
            again[i] = submit(server, *REQUESTS[i]).result(300).token_ids.tolist()

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(again))]
        for thread in reversed(threads):
            thread.start()
        for thread in threads:
            thread.join()
        assert again == expected
        # The beginning that three of them have was processed once.
        assert server.prefixes.reused > 0
        assert len(server.compiled_steps) == compiled
        assert (server.running, server.waiting) == (0, 0)


class Even(LogitsProcessor):
    """Allows even tokens alone, after odd prompts the others."""

    def create_state(self, tokens):
        if (tokens.token_ids == 13).any():
            raise ValueError("13 is no good.")
        last = tokens.token_ids[np.arange(len(tokens.lengths)), tokens.lengths - 1]
        return last % 2

    def call(self, logits, tokens, state):
        allowed = ops.arange(logits.shape[-1])[None] % 2 == state[:, None]
        return ops.where(allowed, logits, -float("inf")), state


@pytest.mark.slow
def test_requests_may_have_a_processor_of_the_servers():
    lm = make_small_lm(make_backbone(num_layers=1))
    even = Even()
    prompts, options = [[5, 6], [7, 3], [8], [5, 6]], {"max_new_tokens": 9}
    own = [{"processors": [even]}, {"processors": even}, {}, {}]
    expected = [alone(lm, x, {**options, **y}) for x, y in zip(prompts, own)]
    assert expected[0] != expected[3] and len(set(expected[1])) > 1
    with lm.serve(max_rows=2, max_length=48, processors=[even]) as server:
        pairs = zip(prompts, own)
        requests = [submit(server, x, {**options, **y}) for x, y in pairs]
        assert [x.result(60).token_ids.tolist() for x in requests] == expected
        with raises(ValueError, "13 is no good"):
            submit(server, [2, 13], own[0])
    with raises(TypeError, "a list of `blocks.LogitsProcessor`"):
        lm.serve(max_rows=2, max_length=48, processors=[3])


@pytest.mark.slow
def test_a_grammar_that_fails_ends_its_request_alone(monkeypatch):
    pytest.importorskip("llguidance")
    lm = make_letters_lm()
    options = {"max_new_tokens": 12, "stop_token_ids": None}
    grammars = [re.compile("[a-f]{11}h"), None, re.compile("[g-m]{5,9}"), None]
    expected = [
        lm.generate("ab", **options, strip_prompt=True, grammar=x) for x in grammars
    ]
    made = []
    next_state = GrammarMask.next_state

    def failing(self):
        made.append(self)
        if sum(x is self for x in made) == 4 and self is broken:
            raise RuntimeError("The grammar is too large.")
        return next_state(self)

    broken = None
    monkeypatch.setattr(GrammarMask, "next_state", failing)
    with lm.serve(max_rows=3, max_length=48, grammars=True) as server:
        compiled = len(server.compiled_steps)
        made.clear()
        first = server.submit("ab", **options, grammar=re.compile("[x-z]+"))
        broken = made[0]
        requests = [server.submit("ab", **options, grammar=x) for x in grammars]
        with raises(RuntimeError, "The grammar is too large"):
            first.result(60)
        assert [x.result(60).text for x in requests] == expected
        # Without one, a row gets several tokens at once.
        assert max(map(len, server.submit("ab", **options))) > 1
        assert len(server.compiled_steps) == compiled


@pytest.fixture(scope="module")
def text_server():
    lm = make_letters_lm()
    with lm.serve(max_rows=2, max_length=48, max_logprobs=2, max_waiting=3) as server:
        yield lm, server


@pytest.mark.slow
def test_text_streams_and_ends_before_a_stop_string(text_server):
    lm, server = text_server
    options = {"max_new_tokens": 20, "stop_token_ids": None}
    options |= {"temperature": 1.0, "seed": 5}
    free = lm.generate("hello", **options, strip_prompt=True)
    stop = free[9:12]
    expected = free[: free.find(stop)]
    request = server.submit("hello", **options, stop=stop, return_logprobs=2)
    pieces = list(request)
    answer = request.result()
    assert "".join(x.text for x in pieces) == answer.text == expected
    told = np.concatenate([x.token_ids for x in pieces])
    assert len(pieces) > 1 and told.tolist() == answer.token_ids.tolist()
    numbers = np.concatenate([x.logprobs.best for x in pieces])
    np.testing.assert_array_equal(numbers, answer.logprobs.best)
    assert (answer.finish_reason, answer.prompt_length) == ("stop", 5)
    whole = lm.generate("hello", **options, stop=stop, return_logprobs=2)
    np.testing.assert_allclose(answer.logprobs.best, whole.logprobs.best, atol=1e-4)
    one = server.submit("hello", **options, stop=stop, return_logprobs=1).result()
    assert one.logprobs.best.shape == (len(one.token_ids), 1)
    tokens = server.submit(list(b"hello"), **options, stop=stop)
    assert tokens.result().logprobs is None
    assert bytes(np.concatenate(list(tokens)).tolist()).decode() == expected


@pytest.mark.slow
def test_the_first_texts_come_from_several_threads(monkeypatch):
    class Slow(StartPacker):
        def __init__(self, **kwargs):
            time.sleep(0.1)
            super().__init__(**kwargs)

    monkeypatch.setattr("blocks.preprocessor.StartPacker", Slow)
    lm = make_letters_lm()
    assert not lm.preprocessor.built
    texts = ["first", "second", "third", "fourth"]
    with lm.serve(max_rows=2, max_length=32) as server:
        with ThreadPoolExecutor(len(texts)) as pool:
            requests = [*pool.map(lambda x: server.submit(x, 4), texts)]
        found = [x.result(300).text for x in requests]
    assert found == [lm.generate(x, max_new_tokens=4, strip_prompt=True) for x in texts]


def test_threads_draw_seeds_of_their_own():
    lm = make_small_lm(make_backbone(num_layers=1), sampler="random")
    gate = threading.Barrier(48)

    def ask(_):
        gate.wait()
        return server.submit([1, 2], 12, None, temperature=2.0)

    with lm.serve(max_rows=8, max_length=16) as server, ThreadPoolExecutor(48) as pool:
        requests = [*pool.map(ask, range(48))]
        assert len({tuple(x.result(60).token_ids) for x in requests}) == 48


def test_asyncio_clients(text_server):
    lm, server = text_server
    options = {"max_new_tokens": 12, "stop_token_ids": None}

    async def stream(text):
        return "".join([x async for x in server.submit(text, **options)])

    async def ask(text):
        return (await server.submit(text, **options)).text

    async def all_of_them():
        return await asyncio.gather(stream("ab"), ask("ab"), stream("the end"))

    found = asyncio.run(all_of_them())
    first, last = lm.generate(["ab", "the end"], **options, strip_prompt=True)
    assert found == [first, first, last]


def test_requests_are_cancelled_and_refused(text_server):
    _, server = text_server
    options = {"max_new_tokens": 40, "stop_token_ids": None}
    requests = [server.submit("ab", **options) for _ in range(2)]
    for request in requests:
        next(iter(request))
    waiting = [server.submit("cd", **options) for _ in range(3)]
    with raises(ServerBusy, "3 requests are waiting"):
        server.submit("ef", **options)
    waiting[0].cancel()
    assert waiting[0].result(60).finish_reason == "cancelled"
    assert waiting[0].result().text == ""
    requests[0].cancel()
    answer = requests[0].result(60)
    assert answer.finish_reason in ("cancelled", "length")
    for request in (requests[1], *waiting[1:]):
        assert len(request.result(60).token_ids) == 40
    requests[1].cancel()  # It has ended: nothing happens.


def test_bad_requests_are_errors_at_once(text_server):
    _, server = text_server
    for kind, parts, prompt, options in (
        (ValueError, ["which is more than `max_length`"], "a" * 49, {}),
        (ValueError, ["leaves no room"], "a" * 48, {}),
        (ValueError, ["one row of tokens"], ["a", "b"], {}),
        (ValueError, ["among those that the server"], "a", {"processors": [Even()]}),
        (TypeError, ["a list of `blocks.LogitsProcessor`"], "a", {"processors": [1]}),
        (ValueError, ["max_logprobs=2"], "a", {"return_logprobs": 3}),
        (ValueError, ["at most 8 stop tokens"], "a", {"stop_token_ids": range(9)}),
        (ValueError, ["at most 64"], "a", {"logit_bias": dict.fromkeys(range(65), 1)}),
        (TypeError, ["no option `tmp`"], "a", {"tmp": 1}),
    ):
        with raises(kind, *parts):
            server.submit(prompt, **options)


@pytest.mark.slow
def test_a_row_with_nan_ends_alone():
    backbone = make_backbone(num_layers=1, tie_word_embeddings=False)
    lm = make_small_lm(backbone)
    good = alone(lm, [5, 6], {"max_new_tokens": 20})
    embeddings = backbone.token_embedding.embeddings
    values = np.array(to_numpy(embeddings))
    assert 33 not in good
    values[33] = np.nan
    embeddings.assign(values)
    with lm.serve(max_rows=3, max_length=48) as server:
        prompts = [[5, 6], [33, 6], [5, 6], [4, 33], [5, 6]]
        requests = [server.submit(x, 20, None) for x in prompts]
        for prompt, request in zip(prompts, requests):
            if 33 in prompt:
                with raises(ValueError, "NaN or infinite"):
                    request.result(60)
                with raises(ValueError, "NaN or infinite"):
                    list(request)
            else:
                assert request.result(60).token_ids.tolist() == good


def test_a_closed_server_ends_what_runs():
    lm = make_small_lm(make_backbone(num_layers=1))
    server = lm.serve(max_rows=1, max_length=64)
    requests = [server.submit([1, 2], 60, None) for _ in range(3)]
    server.close()
    reasons = {x.result(60).finish_reason for x in requests}
    assert "cancelled" in reasons and reasons <= {"cancelled", "length"}
    with raises(RuntimeError, "closed"):
        server.submit([1, 2], stop_token_ids=None)
    lm.compile(sampler="beam")
    with raises(ValueError, "BeamSampler", "`serve`"):
        lm.serve()
    lm.compile(sampler="greedy")
    with raises(ValueError, "has learned 64 positions", "max_length=65"):
        lm.serve(max_length=65)
