"""The HTTP server, asked by OpenAI's own client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from blocks import Completion, Logprobs
from blocks.generation.texts import TextPieces
from blocks.serve import make_app
from blocks.serving.http import create_app
from blocks.serving.http_types import CompletionAsked, Limits
from tests.models import byte_preprocessor, make_letters_lm

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} {% endfor %}{{ tools }}"
)
VARIED = {"temperature": 1.0, "seed": 5}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(app, port):
    """Serves an application in a thread."""
    config = uvicorn.Config(app, port=port, log_level="warning", timeout_keep_alive=75)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def served():
    lm = make_letters_lm(sequence_length=64)
    lm.preprocessor.chat_template = TEMPLATE
    limits = Limits(body_bytes=20_000, new_tokens=40, answers=8, seconds=120)
    app, server = make_app(
        lm,
        "letters",
        "key",
        limits,
        max_rows=3,
        max_length=128,
        max_logprobs=3,
        grammars=True,
    )
    port = free_port()
    with server, running(app, port):
        url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=url + "/v1", api_key="key", max_retries=0)
        yield lm, server, client, url


def get(url):
    with urllib.request.urlopen(url) as response:
        return response.read().decode()


def expected(lm, prompt, count, **options):
    options = {"stop_token_ids": "auto", "strip_prompt": True, **options}
    return lm.generate(prompt, max_new_tokens=count, **options)


def test_completions(served):
    lm, _, client, _ = served
    found = client.completions.create(
        model="letters", prompt=["hello", "ab"], max_tokens=12, logprobs=2, **VARIED
    )
    texts = [x.text for x in found.choices]
    assert texts == expected(lm, ["hello", "ab"], 12, **VARIED)
    whole = lm.generate("hello", max_new_tokens=12, return_logprobs=2, **VARIED)
    numbers = found.choices[0].logprobs
    np.testing.assert_allclose(numbers.token_logprobs, whole.logprobs.chosen, atol=1e-4)
    assert "".join(numbers.tokens) == texts[0]
    assert [len(x) for x in numbers.top_logprobs] == [2] * 12
    assert found.usage.prompt_tokens == 7
    assert found.usage.completion_tokens == 24
    assert [x.finish_reason for x in found.choices] == ["length", "length"]
    tokens = client.completions.create(
        model="letters", prompt=list(b"ab"), max_tokens=12, n=2, **VARIED
    )
    first, second = [x.text for x in tokens.choices]
    assert first == texts[1] != second
    null = {"model": "letters", "prompt": "ab", "n": None, "stream": None, **VARIED}
    (one,) = client.completions.create(**null, max_tokens=12).choices
    assert one.text == first


def test_completions_stream_and_stop(served):
    lm, _, client, _ = served
    free = expected(lm, "hello", 20, **VARIED)
    stop = free[9:12]
    chunks = list(
        client.completions.create(
            model="letters",
            prompt="hello",
            max_tokens=20,
            stop=stop,
            logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
            **VARIED,
        )
    )
    text = "".join(x.choices[0].text for x in chunks if x.choices)
    assert text == free[: free.find(stop)]
    numbers = [x.choices[0].logprobs for x in chunks if x.choices]
    tokens = [token for x in numbers if x for token in x.tokens]
    assert tokens == list(text)
    places = [place for x in numbers if x for place in x.text_offset]
    assert places == list(range(len(text)))
    assert all(len(y) == 2 for x in numbers if x for y in x.top_logprobs)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(text)


def test_text_offsets_are_those_of_whole_characters():
    raw = "añ€b𝄞".encode()
    asked = CompletionAsked(prompt="", logprobs=0)

    def offsets(*lengths):
        pieces, tokens, found = TextPieces(1, byte_preprocessor()), [*raw], []
        for length in lengths:
            new, tokens = np.array(tokens[:length]), tokens[length:]
            numbers = Logprobs(np.zeros(length), (), ())
            answer = Completion(None, new, None, 0, numbers)
            found += asked.logprobs_of(answer, chr, pieces)["text_offset"]
        return found

    expected = [len(raw[:i].decode(errors="ignore")) for i in range(len(raw))]
    assert offsets(len(raw)) == offsets(2, 3, 3, 3) == expected


def test_usage_of_a_stream_is_that_of_the_answer(served):
    _, _, client, _ = served
    usage = {"stream_options": {"include_usage": True}, "stream": True}
    for seed in range(4):
        options = {"prompt": ["ab", "xyz" * 5], "n": 2, "stop": ["a", "b", "c", "d"]}
        options |= {"model": "letters", "max_tokens": 40, "seed": seed}
        found = client.completions.create(**options, temperature=1.5)
        *_, last = client.completions.create(**options, temperature=1.5, **usage)
        assert last.usage == found.usage
        assert found.usage.prompt_tokens == 17


def test_chat(served):
    lm, _, client, _ = served
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompt = lm.apply_chat_template(messages, tools)
    assert "function" in prompt
    wanted = expected(lm, prompt, 10, **VARIED)
    options = {"model": "letters", "messages": messages, "tools": tools, **VARIED}
    found = client.chat.completions.create(
        **options, max_completion_tokens=10, logprobs=True, top_logprobs=3
    )
    assert found.choices[0].message.content == wanted
    content = found.choices[0].logprobs.content
    assert "".join(x.token for x in content) == wanted
    assert all(len(x.top_logprobs) == 3 for x in content)
    chunks = list(client.chat.completions.create(**options, max_tokens=10, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_content_in_parts_is_its_text(served):
    lm, _, client, _ = served

    def ask(*parts):
        messages = [{"role": "user", "content": parts}]
        return client.chat.completions.create(
            model="letters", messages=messages, max_tokens=9, temperature=0
        )

    answer = ask({"type": "text", "text": "h"}, {"type": "text", "text": "i"})
    prompt = lm.apply_chat_template([{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == expected(lm, prompt, 9)
    with pytest.raises(openai.BadRequestError, match="type 'image_url'"):
        ask({"type": "image_url", "image_url": {"url": "data:"}})


def test_json_schema(served):
    _, server, client, _ = served
    schema = {"enum": ["yes", "no"]}
    compiled = len(server.compiled_steps)
    found = client.chat.completions.create(
        model="letters",
        messages=[{"role": "user", "content": "hi"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema},
        },
        max_tokens=30,
        n=3,
        **VARIED,
    )
    for choice in found.choices:
        assert json.loads(choice.message.content) in ("yes", "no")
        assert choice.finish_reason == "stop"
    assert server.compiled_steps[compiled:] == ()


def test_models_health_and_metrics(served):
    _, _, client, url = served
    client.completions.create(model="letters", prompt="a", max_tokens=3)
    assert [x.id for x in client.models.list()] == ["letters"]
    assert client.models.retrieve("letters").object == "model"
    assert "ok" in get(url + "/health")
    text = get(url + "/metrics")
    assert 'blocks_requests_total{endpoint="completions"}' in text
    assert "blocks_new_tokens_total" in text and "blocks_running 0.0" in text


def test_bad_requests(served):
    _, _, client, _ = served

    def refused(status, part, **options):
        options = {"model": "letters", "prompt": "a", "max_tokens": 2, **options}
        with pytest.raises(openai.APIStatusError) as error:
            client.completions.create(**options)
        assert error.value.status_code == status
        assert part in str(error.value)

    refused(400, "top_p", top_p=3.0)
    refused(400, "logprobs", logprobs=9)
    refused(400, "max_tokens", max_tokens=0)
    refused(400, "max_length", prompt="a" * 200)
    refused(400, "echo", extra_body={"echo": True})
    refused(400, "at most 8", n=9)
    refused(413, "20000", prompt="a" * 30_000)
    other = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        other.completions.create(model="letters", prompt="a")


@pytest.mark.parametrize(
    "status, part, path, body",
    [
        (400, "`inputs` is empty", "completions", b'{"prompt": []}'),
        (400, "surrogate", "completions", rb'{"prompt": "a\ud800"}'),
        (400, "`seed`", "completions", b'{"prompt": "a", "seed": %d}' % 2**70),
        (404, "Not Found", "nothing", None),
        (404, "no model 'other'", "models/other", None),
        (405, "Method Not Allowed", "completions", None),
        (413, "20000", "completions", [b"a" * 9000] * 3),  # in chunks
    ],
)
def test_errors_have_openais_form(served, status, part, path, body):
    headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
    url = f"{served[-1]}/v1/{path}"
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(url, body, headers))
    assert error.value.code == status
    assert part in json.loads(error.value.read())["error"]["message"]


def test_seeds_of_several_answers_are_64_bits(served):
    _, _, client, _ = served
    options = {"model": "letters", "prompt": "ab", "max_tokens": 9, "temperature": 1}
    first, second = [
        [x.text for x in client.completions.create(**options, n=2, seed=seed).choices]
        for seed in (-1, 2**64 - 1)
    ]
    assert first == second and len(set(first)) == 2


def test_time_that_is_up_ends_an_answer(served):
    _, server, _, _ = served
    app = create_app(server, "letters", None, None, limits=Limits(seconds=0.0))
    port, options = free_port(), {"model": "letters", "prompt": "hello"}
    with running(app, port):
        url = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        found = client.completions.create(**options, max_tokens=99)
        *_, last = client.completions.create(**options, max_tokens=99, stream=True)
    assert [x.choices[0].finish_reason for x in (found, last)] == ["length"] * 2
    assert len(found.choices[0].text) < 99


def test_a_client_that_goes_away_frees_its_row(served):
    _, server, client, _ = served
    options = {"model": "letters", "prompt": "hello", "max_tokens": 40, "stream": True}
    streams = [client.completions.create(**options) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    end = time.monotonic() + 30
    while server.running and time.monotonic() < end:
        time.sleep(0.02)
    assert not server.running


def test_many_clients_at_once(served):
    lm, server, client, _ = served
    prompts = [f"client {i % 7}" for i in range(200)]
    wanted = dict(zip(prompts[:7], expected(lm, prompts[:7], 6)))
    compiled = len(server.compiled_steps)
    assert ask_at_once(client, prompts) == [wanted[x] for x in prompts]
    assert server.compiled_steps[compiled:] == ()


def ask_at_once(client, prompts):
    """Returns the answers to prompts, each from a thread of its own."""
    found = [None] * len(prompts)

    def ask(i):
        answer = client.completions.create(
            model="letters", prompt=prompts[i], max_tokens=6, temperature=0
        )
        found[i] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def resident_memory(process):
    """Returns the memory of a process in MiB."""
    with open(f"/proc/{process.pid}/status") as status:
        (line,) = [x for x in status if x.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """The command line, on a preset; its memory is that of the first 200 clients."""
    make_letters_lm().save_to_preset(str(tmp_path))
    script = (
        "import tests.models, runpy, sys;"
        "sys.argv = ['serve', *sys.argv[1:]];"
        "runpy.run_module('blocks.serve', run_name='__main__')"
    )
    answers = []
    for _ in range(2):
        port = free_port()
        arguments = [str(tmp_path), "--port", str(port), "--max-length", "64"]
        process = subprocess.Popen([sys.executable, "-c", script, *arguments])
        try:
            client = openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
            )
            for _ in range(600):
                with contextlib.suppress(openai.APIConnectionError):
                    name = client.models.list().data[0].id
                    break
                assert process.poll() is None
                time.sleep(0.2)
            answer = client.completions.create(
                model=name, prompt="hello", max_tokens=9, temperature=0
            )
            answers.append(answer.choices[0].text)
            used = []
            for _ in range(4):
                prompts = [f"client {i}" for i in range(200)]
                assert all(len(x) == 6 for x in ask_at_once(client, prompts))
                used.append(resident_memory(process))
            print("MiB after 200, 400, 600 and 800 clients:", used)
            assert used[-1] < used[0] + 16
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert answers[0] == answers[1] and len(answers[0]) == 9
