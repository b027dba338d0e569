"""Serve a model by several replicas on Ray Serve, to OpenAI's clients.

    pip install "ray[serve]"
    python examples/ray_serve.py FOLDER                # two replicas, until Ctrl-C
    python examples/ray_serve.py FOLDER --gpus 1       # each has a GPU of its own
    python examples/ray_serve.py --quick               # a tiny untrained model, asked

FOLDER is what `python -m blocks.serve` takes, and the HTTP interface is the same: each
replica is a process with `blocks.serve.make_app`, which batches what it is asked, and Ray
divides requests among them. The header `x-replica` of an answer says which one it was.
It listens on this machine alone, unless `--host` says otherwise.
"""

import argparse
import concurrent.futures
import contextlib
import os
import signal
import socket
import sys
import tempfile

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import ray
    from ray import serve
except ImportError as error:
    sys.exit(f'This example needs Ray Serve: pip install "ray[serve]" ({error})')

import keras
import keras_hub

from blocks import CausalLM, CausalLMPreprocessor
from blocks.models.llama import LlamaBackbone
from blocks.serve import make_app
from blocks.serving.http_types import Limits


@serve.ingress()
class Replica:
    """A process with the model, and its HTTP interface."""

    def __init__(self, folder, name, api_key, **options):
        lm = CausalLM.from_preset(folder)
        if lm.sampler is None:
            lm.compile()
        self.http, self.server = make_app(lm, name, api_key, Limits(), **options)

    def __serve_build_asgi_app__(self):
        """Returns the ASGI application, which tells the replica's name."""
        replica = serve.get_replica_context().replica_id.unique_id.encode()

        async def named(scope, receive, send):
            async def send_named(message):
                if message["type"] == "http.response.start":
                    headers = [*message["headers"], (b"x-replica", replica)]
                    message = {**message, "headers": headers}
                await send(message)

            await self.http(scope, receive, send_named)

        return named

    def check_health(self):
        """Raises an error if the model can't answer: Ray then starts another replica."""
        if not self.server.is_open:
            raise RuntimeError("The server is closed.")

    def __del__(self):
        if hasattr(self, "server"):
            self.server.close()


def start(folder, options, **sizes):
    """Starts the replicas, and returns the address when all of them answer."""
    # Each replica takes one of these.
    count = options.replicas
    ray.init(include_dashboard=False, num_cpus=count, logging_level="WARNING")
    serve.start(http_options={"host": options.host, "port": options.port})
    deployment = serve.deployment(
        Replica,
        num_replicas=count,
        # What runs and what waits in a replica, so that its rows are filled.
        max_ongoing_requests=sizes["max_rows"] + sizes["max_waiting"],
        ray_actor_options={"num_cpus": 1, "num_gpus": options.gpus},
    )
    name = os.path.basename(os.path.normpath(folder))
    if os.path.exists(folder):
        folder = os.path.abspath(folder)
    serve.run(deployment.bind(folder, name, options.api_key, **sizes))
    return f"http://{options.host}:{options.port}/v1"


def tiny_model():
    """Returns a model that has learned nothing, which speaks in bytes."""
    keras.utils.set_random_seed(0)
    tokenizer = keras_hub.tokenizers.ByteTokenizer()
    preprocessor = CausalLMPreprocessor(tokenizer, 64, end_token=0)
    lm = CausalLM(LlamaBackbone(256, 1, 2, 16, 32), preprocessor)
    lm.compile()
    return lm


def ask(client, number):
    """Returns an answer and the replica it came from; every second one is streamed."""
    stream, asked = number % 2 == 1, client.completions.with_raw_response
    question = {"prompt": f"{number} is", "temperature": number % 3 / 2, "seed": number}
    found = asked.create(model="tiny", **question, max_tokens=12, stream=stream)
    answer = found.parse()
    pieces = answer if stream else [answer]
    text = "".join(x.choices[0].text for x in pieces if x.choices)
    return question, text, found.headers["x-replica"]


def quick(options):
    """Asks two replicas of a tiny model at once, and compares with `generate`."""
    import openai

    options.replicas = 2
    with socket.socket() as probe:
        probe.bind((options.host, 0))
        options.port = probe.getsockname()[1]
    lm = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "tiny")
        lm.save_to_preset(path)
        url = start(path, options, max_rows=2, max_length=64, max_waiting=32)
        client = openai.OpenAI(base_url=url, api_key=options.api_key or "none")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(lambda i: ask(client, i), range(24))]
    for question, text, _ in answers:
        prompt = question.pop("prompt")
        expected = lm.generate(prompt, max_new_tokens=12, strip_prompt=True, **question)
        assert text == expected, (prompt, text, expected)
    counts = {x: sum(x == y for *_, y in answers) for *_, x in answers}
    print(f"{len(answers)} answers as from `generate`, by replica: {counts}")
    assert len(counts) == 2, counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", help="a preset, or a published checkpoint")
    add("--replicas", type=int, default=2)
    add("--gpus", type=float, default=0, help="of each replica; 0 hides them from it")
    add(
        "--cpus", type=int, help="that Ray counts on; default: all. A replica takes one"
    )
    add("--host", default="127.0.0.1", help="default: this machine alone")
    add("--port", type=int, default=8000)
    add("--api-key", default=os.environ.get("BLOCKS_API_KEY"))
    add(
        "--max-rows", type=int, default=8, help="requests that run at once in a replica"
    )
    add("--max-length", type=int, default=1024, help="tokens of a request")
    add("--quick", action="store_true", help="a tiny model on two replicas, asked")
    options = parser.parse_args()
    if not options.quick and options.folder is None:
        parser.error("Which FOLDER? Or --quick.")
    try:
        if options.quick:
            quick(options)
            return
        sizes = {"max_rows": options.max_rows, "max_length": options.max_length}
        print(start(options.folder, options, **sizes, max_waiting=256), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
