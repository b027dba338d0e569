"""Evaluate a model by EleutherAI's lm-eval, on tasks made of Python's documentation.

    pip install lm-eval
    python examples/lm_eval_harness.py                          # SmolLM2-135M, fetched
    python examples/lm_eval_harness.py --checkpoint path/or/hf://handle
    python examples/lm_eval_harness.py --tasks hellaswag arc_easy   # lm-eval downloads them
    python examples/lm_eval_harness.py --quick                  # a tiny untrained model

`BlocksLM` is all that lm-eval needs of a `blocks.CausalLM`: likelihoods by `lm.score`,
answers by `lm.generate`. The three tasks need no download: which ending of a sentence is
the real one, how likely paragraphs are, and copying a line after two examples.
"""

import argparse
import json
import logging
import os
import re
import sys
from pydoc_data.topics import topics

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

try:
    import datasets
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    sys.exit(f"This example needs lm-eval: pip install lm-eval ({error})")

import fetch
import keras
import keras_hub
import numpy as np

from blocks import CausalLM, CausalLMPreprocessor
from blocks.models.llama import LlamaBackbone


class BlocksLM(LM):
    """A `blocks.CausalLM` as lm-eval asks its models.

    Args:
        lm: a `blocks.CausalLM` with a `blocks.CausalLMPreprocessor`.
        batch_size: int. How many rows are processed at once.
        max_length: int or `None`. The tokens that the model sees at most; by default the
            backbone's `max_sequence_length`. What is longer loses its beginning.
        max_new_tokens: int. Those of an answer where a task does not say.
    """

    def __init__(self, lm, batch_size=16, max_length=None, max_new_tokens=256):
        super().__init__()
        self.lm, self.batch_size, self.max_new_tokens = lm, batch_size, max_new_tokens
        known = getattr(lm.backbone, "max_sequence_length", 2048)
        self.max_length = max_length or known
        # As lm-eval's own models, whose answers have no special tokens.
        backend = getattr(lm.preprocessor.tokenizer, "backend", None)
        added = backend.get_added_tokens_decoder().values() if backend else ()
        names = "|".join(re.escape(x.content) for x in added if x.special)
        self.special = re.compile(names or r"(?!)")

    def encode(self, text, add_start=True):
        """Returns the tokens of a text, after the start token where texts have one."""
        preprocessor = self.lm.preprocessor
        tokens = keras.ops.convert_to_numpy(preprocessor.tokenizer(text)).tolist()
        start = preprocessor.start_token_id
        wanted = add_start and preprocessor.add_start_token and start is not None
        return [start, *tokens] if wanted and tokens[:1] != [start] else tokens

    @property
    def first(self):
        """Returns the token that is before a text without a context."""
        start = self.lm.preprocessor.start_token_id
        return self.lm.preprocessor.end_token_id if start is None else start

    def encode_pair(self, context, continuation):
        """Returns the tokens of a context, and those that follow it in the whole text."""
        if not context:
            tokens = self.encode(continuation, add_start=False)
            has_first = tokens[:1] == [self.first]
            return [self.first], tokens[1:] if has_first else tokens
        # Spaces belong to the word after them.
        before, whole = map(self.encode, (context.rstrip(), context + continuation))
        return before or [self.first], whole[len(before) :]

    def loglikelihood(self, requests):
        """Returns the log-probability of each continuation, and whether greedy decoding
        makes it."""
        found = self.score([self.encode_pair(*x.args) for x in requests])
        for request, answer in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def score(self, pairs):
        """Returns what `loglikelihood` does, of pairs of tokens."""
        for _, new in pairs:
            if not 0 < len(new) <= self.max_length:
                raise ValueError(
                    "A continuation must have at least one token, and at most "
                    f"`max_length={self.max_length}`. Received one of {len(new)}."
                )
        # The last token is predicted, not seen.
        rows = [(before + new)[-self.max_length - 1 :] for before, new in pairs]
        scores = self.lm.score(rows, return_logprobs=1, batch_size=self.batch_size)
        found = []
        for (_, new), score in zip(pairs, scores):
            logprob = score.logprobs.chosen[-len(new) :].sum()
            likeliest = score.logprobs.best_ids[-len(new) :, 0]
            found.append((float(logprob), np.array_equal(likeliest, new)))
        return found

    def loglikelihood_rolling(self, requests):
        """Returns the log-probability of whole texts, in windows where they are long."""
        # As lm-eval's own models, with the start token where the tokenizer has one.
        texts = [self.encode(x.args[0]) for x in requests]
        how = self.first, self.max_length, 1
        windows = [utils.get_rolling_token_windows(x, *how) for x in texts]
        windows = [[*map(utils.make_disjoint_window, x)] for x in windows]
        scores = iter(self.score([x for y in windows for x in y]))
        return [sum(next(scores)[0] for _ in x) for x in windows]

    def generate_until(self, requests):
        """Returns answers, which end before the first of their stop strings."""
        groups = {}
        for place, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault(key, []).append(place)
        found = [""] * len(requests)
        for key, places in groups.items():
            options = self.read_options(json.loads(key))
            room = self.max_length - options["max_new_tokens"]
            # Prompts of about one length are processed together.
            places.sort(key=lambda i: len(requests[i].args[0]))
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                prompts = [self.last_tokens(requests[i].args[0], room) for i in part]
                texts = self.lm.generate(prompts, strip_prompt=True, **options)
                for i, text in zip(part, texts):
                    text = found[i] = self.special.sub("", text)
                    self.cache_hook.add_partial(
                        "generate_until", requests[i].args, text
                    )
        return found

    def read_options(self, asked):
        """Returns options of `lm.generate`; it tells which of the others it lacks."""
        options = dict(normalize_gen_kwargs(asked, self.max_new_tokens))
        temperature = options.pop("temperature", 1.0)
        options["temperature"] = temperature if options.pop("do_sample") else 0.0
        options["stop"] = [x for x in options.pop("until") if x] or None
        options["max_new_tokens"] = options.pop("max_gen_toks")
        return options

    def last_tokens(self, text, count):
        """Returns the end of a text, of at most so many tokens."""
        if count < 1:
            raise ValueError(
                "A task asks for as many new tokens as the model sees in all "
                f"(`max_length={self.max_length}`)."
            )
        tokens, kept = self.encode(text, add_start=False), count
        while len(self.encode(text)) > count:
            row = np.array(tokens[-kept:], "int32")
            x = {"token_ids": row, "padding_mask": np.ones_like(row)}
            text, kept = self.lm.preprocessor.generate_postprocess(x), kept - 1
        return text

    # === Chats, for `simple_evaluate(..., apply_chat_template=True)` ===

    @property
    def tokenizer_name(self):
        """Returns what lm-eval's cache of requests knows the template by."""
        return str(self.lm.preprocessor.chat_template)

    def chat_template(self, chat_template=False):
        """Returns the template, for lm-eval's log."""
        return self.tokenizer_name if chat_template else None

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """Returns a conversation as a prompt."""
        if not add_generation_prompt:
            raise NotImplementedError("Tasks that begin the model's answer.")
        return self.lm.apply_chat_template(chat_history)


def read_topics():
    """Returns paragraphs of prose by topic, and a sentence of each topic."""
    paragraphs, sentences = [], []
    for name in sorted(topics):
        blocks = [" ".join(x.split()) for x in topics[name].split("\n\n")]
        prose = [x for x in blocks if re.match(r"[A-Z][^*=]{80,}\.$", x)]
        found = [y for x in prose for y in re.split(r"(?<=\.) ", x)]
        found = [x for x in found if 8 <= len(x.split()) <= 24]
        paragraphs += prose[:1]
        sentences += found[:1]
    return list(dict.fromkeys(paragraphs)), list(dict.fromkeys(sentences))


def make_tasks():
    """Returns the three tasks, as lm-eval has them."""
    paragraphs, sentences = read_topics()
    words = [x.split() for x in sentences]
    starts = [" ".join(x[: len(x) // 2]) for x in words]
    ends = [" ".join(x[len(x) // 2 :]) for x in words]
    endings = []
    for i, start in enumerate(starts):
        choices = [ends[(i + step) % len(ends)] for step in (1, 2, 3)]
        choices.insert(i % 4, ends[i])
        endings.append({"start": start, "choices": choices, "gold": i % 4})
    lines = [{"text": x} for x in starts]

    def make(name, docs, metrics, **config):
        splits = {k: datasets.Dataset.from_list(x) for k, x in docs.items()}
        metrics = [
            {"metric": metric, "aggregation": how, "higher_is_better": how == "mean"}
            for metric, how in metrics.items()
        ]
        return ConfigurableTask(
            config={
                "task": name,
                "custom_dataset": lambda: splits,
                "test_split": "test",
                "metric_list": metrics,
                **config,
            }
        )

    return [
        make(
            "topics_endings",
            {"test": endings},
            {"acc": "mean", "acc_norm": "mean"},
            output_type="multiple_choice",
            doc_to_text="start",
            doc_to_choice="choices",
            doc_to_target="gold",
        ),
        make(
            "topics_paragraphs",
            {"test": [{"text": x} for x in paragraphs]},
            {
                "byte_perplexity": "weighted_perplexity",
                "bits_per_byte": "bits_per_byte",
            },
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="text",
        ),
        make(
            "topics_copy",
            {"train": lines[:2], "test": lines[2:]},
            {"exact_match": "mean"},
            output_type="generate_until",
            doc_to_text="Line: {{text}}\nCopy:",
            doc_to_target="text",
            num_fewshot=2,
            fewshot_split="train",
            fewshot_config={"sampler": "first_n"},
            generation_kwargs={"until": ["\n"], "max_gen_toks": 64},
            filter_list=[
                {
                    "name": "none",
                    "filter": [
                        {"function": "remove_whitespace"},
                        {"function": "take_first"},
                    ],
                }
            ],
        ),
    ]


def evaluate(model, tasks=None, **options):
    """Returns what lm-eval's `simple_evaluate` does, by default on the three tasks."""
    return lm_eval.simple_evaluate(
        model,
        tasks=tasks or make_tasks(),
        task_manager=TaskManager(include_defaults=bool(tasks)),
        **options,
    )


def tiny_model():
    """Returns a model that has learned nothing, which speaks in bytes."""
    keras.utils.set_random_seed(0)
    tokenizer = keras_hub.tokenizers.ByteTokenizer()
    preprocessor = CausalLMPreprocessor(tokenizer, 512, end_token=0)
    return CausalLM(LlamaBackbone(256, 2, 4, 32, 64), preprocessor)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", help="a folder, a GGUF file or a handle instead of SmolLM2")
    add("--tasks", nargs="+", help="names of lm-eval's tasks instead of the three")
    add("--limit", type=int, help="documents of each task; default: all")
    add("--batch", type=int, default=16, help="rows that are processed at once")
    add("--dtype", help="float32, bfloat16 or float16")
    add("--chat", action="store_true", help="ask by the model's chat template")
    add("--quick", action="store_true", help="a tiny untrained model, no download")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel("ERROR")
    if options.quick:
        lm, options.limit = tiny_model(), 4
    else:
        path = options.checkpoint or str(fetch.model())
        lm = CausalLM.from_preset(path, dtype=options.dtype)
    lm.compile(sampler="greedy")
    results = evaluate(
        BlocksLM(lm, options.batch),
        options.tasks,
        limit=options.limit,
        apply_chat_template=options.chat,
        bootstrap_iters=1000,
    )
    print(utils.make_table(results))
    if options.quick:
        # All bytes are about as likely to a model that has learned nothing.
        bits = results["results"]["topics_paragraphs"]["bits_per_byte,none"]
        assert abs(bits - 8) < 0.5, bits


if __name__ == "__main__":
    main()
