"""Grammars: every answer keeps to its own, in batches, streams and sessions."""

import json
import re

import keras
import keras_hub
import numpy as np
import pytest
import tokenizers

from blocks import (
    CausalLM,
    CausalLMPreprocessor,
    CustomBackbone,
    DraftModel,
    JsonTokenizer,
    PromptLookup,
    Speculation,
)
from tests.helpers import raises
from tests.models import make_backbone, make_lm

pytest.importorskip("llguidance")

VARIED = {"temperature": 1.0, "strip_prompt": True}
YES = 'start: "yes" | "no" | "maybe"'


def json_tokenizer():
    """Of bytes, and some pairs of them that JSON has."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {x: i for i, x in enumerate(["<|end|>", *alphabet])}
    merges = [('"', ":"), ("{", '"'), (",", "\u0120"), ("t", "r"), ("u", "e")]
    merges += [("tr", "ue")]
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return JsonTokenizer(made.to_str()), "<|end|>"


def bpe_tokenizer():
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {x: i for i, x in enumerate(["<end>", *characters, "tr"])}
    merges = ["t r"]
    options = {"unsplittable_tokens": ["<end>"]}
    made = keras_hub.tokenizers.BytePairTokenizer(vocabulary, merges, **options)
    return made, "<end>"


TOKENIZERS = {
    "json": json_tokenizer,
    "byte": lambda: (keras_hub.tokenizers.ByteTokenizer(), 1),
    "bpe": bpe_tokenizer,
}


def make_model(kind="json"):
    tokenizer, end = TOKENIZERS[kind]()
    size = tokenizer.vocabulary_size()
    # More tokens than the tokenizer has.
    backbone = make_backbone(
        vocabulary_size=size + 7, num_layers=1, max_sequence_length=512
    )
    return make_lm(backbone, CausalLMPreprocessor(tokenizer, 400, end_token=end))


@pytest.fixture(scope="module")
def lm():
    return make_model()


def random_schema(rng, depth=2):
    """A schema whose values are of bounded length, and a function that checks one."""
    kind = rng.choice(["integer", "boolean", "enum", "string", "array", "object"])
    if kind == "integer":
        low = int(rng.integers(-50, 50))
        schema = {"type": "integer", "minimum": low, "maximum": low + 9}
        return schema, lambda x: type(x) is int and low <= x <= low + 9
    if kind == "enum":
        values = ["red", 7, None, True][: rng.integers(1, 5)]
        return {"enum": values}, lambda x: x in values
    if kind == "string":
        most = int(rng.integers(1, 6))
        schema = {"type": "string", "maxLength": most}
        return schema, lambda x: isinstance(x, str) and len(x) <= most
    if kind == "boolean" or not depth:
        return {"type": "boolean"}, lambda x: isinstance(x, bool)
    inner = [random_schema(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    if kind == "array":
        schema, fits = inner[0]
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 3}
        return schema, lambda x: 1 <= len(x) <= 3 and all(map(fits, x))
    names = [f"key {i}" for i in range(len(inner))]
    schema = {
        "type": "object",
        "properties": {name: x[0] for name, x in zip(names, inner)},
        "required": names,
        "additionalProperties": False,
    }
    return (
        schema,
        lambda x: (
            list(x) == names
            and all(fits(x[name]) for name, (_, fits) in zip(names, inner))
        ),
    )


def check_schemas(lm, count, rows):
    rng = np.random.default_rng(count)
    for start in range(0, count, rows):
        pairs = [random_schema(rng) for _ in range(rows)]
        prompts = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in pairs]
        found = lm.generate(
            prompts,
            max_new_tokens=300,
            grammar=[schema for schema, _ in pairs],
            seed=list(range(start, start + rows)),
            return_logprobs=0,
            **VARIED,
        )
        for (schema, fits), answer in zip(pairs, found):
            assert answer.finish_reason == "stop", (schema, answer.text)
            text = answer.text.removesuffix("<|end|>")
            assert fits(json.loads(text)), (schema, text)


def test_json_keeps_to_random_schemas(lm):
    check_schemas(lm, 20, 10)


@pytest.mark.slow
@pytest.mark.skipif(keras.config.backend() != "jax", reason="one backend is enough")
def test_json_keeps_to_a_thousand_random_schemas(lm):
    check_schemas(lm, 1000, 50)


@pytest.mark.parametrize("kind", ["json", "byte", "bpe"])
def test_each_row_has_a_grammar_of_its_own(kind):
    lm = make_model(kind)
    options = {**VARIED, "max_new_tokens": 30, "seed": 4}
    grammars = [re.compile("[a-c]{3,9}x"), None, YES]
    found = lm.generate(["once", "upon", "a"], **options, grammar=grammars)
    clean = [x.removesuffix("<|end|>").removesuffix("<end>") for x in found]
    clean = [x.rstrip("\x01") for x in clean]
    assert re.fullmatch("[a-c]{3,9}x", clean[0])
    assert clean[2] in ("yes", "no", "maybe")
    # A row without one is not affected; each is what it is alone.
    assert found[1] == lm.generate("upon", **options)
    assert found[0] == lm.generate("once", **options, grammar=grammars[0])
    pieces = lm.stream(["once", "upon", "a"], **options, grammar=grammars)
    assert ["".join(x) for x in zip(*pieces)] == found
    session = lm.start("a")
    turn = {x: options[x] for x in ("temperature", "max_new_tokens", "seed")}
    assert session.generate(**turn, grammar=YES) == found[2]


class Guesses(Speculation):
    """The continuation `rows` of prompts with an error in every fifth token."""

    def __init__(self, rows):
        super().__init__(4)
        self.rows = rows

    def propose(self, memory, rows):
        found = []
        for row, right in zip(rows, self.rows):
            guess = right[len(row) : len(row) + self.num_tokens].copy()
            guess[(np.arange(len(row), len(row) + len(guess)) % 5) == 0] = 1
            found.append(guess[: self.num_tokens if len(row) else 0])
        return found


@pytest.mark.slow
def test_grammars_with_speculation(lm):
    prompts = ["once", "upon", "a", "time"]
    schema = {"type": "object", "properties": {"key": {"type": "boolean"}}}
    schema |= {"required": ["key"], "additionalProperties": False}
    options = {"max_new_tokens": 24, "seed": 3, "temperature": 1.0}
    options["grammar"] = [re.compile("[a-c]{3,9}x"), None, YES, schema]
    plain = lm.generate(prompts, **options, return_logprobs=0)
    tokens = lm.preprocessor.tokenizer
    rows = [
        np.append(np.asarray(tokens(text)), answer.token_ids).astype("int32")
        for text, answer in zip(prompts, plain)
    ]
    # Right and wrong guesses, and some that the grammar does not allow.
    for speculation in (Guesses(rows), PromptLookup(), DraftModel(lm, 3)):
        found = lm.generate(
            prompts, **options, return_logprobs=0, speculation=speculation
        )
        for one, other in zip(plain, found):
            assert one.text == other.text
            assert one.finish_reason == other.finish_reason


def test_bad_grammars_are_errors(lm):
    for kind, parts, grammar in (
        (ValueError, ["`grammar` is not valid"], 'start: "a'),
        (ValueError, ["`grammar` is not valid"], re.compile(r"(a)\1")),
        (ValueError, ["`grammar` is not valid", "nonsense"], {"type": "nonsense"}),
        (TypeError, ["a dict (a JSON schema)"], 3),
    ):
        with raises(kind, *parts):
            lm.generate("a", max_new_tokens=3, grammar=grammar)
    with raises(ValueError, "`grammar` is an option of `generate`"):
        lm.prefill("a", 9, grammar=YES)
    tokens = CausalLM(CustomBackbone(50, 1, 2, 16, 32, max_sequence_length=32))
    tokens.compile(sampler="greedy")
    with raises(ValueError, "`preprocessor`"):
        tokens.generate([[1, 2]], max_new_tokens=3, stop_token_ids=None, grammar=YES)
