"""Bad input to blocks, backbones and `generate`: clear errors, nothing lost."""

import functools

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from blocks import (
    CausalLM,
    CustomBackbone,
    CustomDecoder,
    CustomEncoderBackbone,
    FeedForward,
    GatedFeedForward,
    TextClassifier,
)
from blocks.models.llama import LlamaBackbone
from tests.helpers import raises
from tests.models import (
    RAGGED,
    byte_preprocessor,
    generated,
    make_backbone,
    make_lm,
    prompts,
)

pytestmark = pytest.mark.same_everywhere

# === Hooks and arguments ===


def decoder_whose(hook, value):
    cls = type("MyDecoder", (CustomDecoder,), {hook: lambda self, shape: value()})
    return cls(32, 4)(np.zeros((1, 2, 16)))


def backbone_whose(hook, value):
    cls = type("MyBackbone", (CustomBackbone,), {hook: lambda self, *args: value()})
    return cls(60, 1, 4, 16, 32)


def uncached():
    return keras.layers.MultiHeadAttention(2, 4)


PARTS = ["create_attention_layer", "create_ffn", "create_norm"]
WHOLE = ["create_embedding", "create_decoder", "create_final_norm"]
CACHED = "`create_cache`"


@pytest.mark.parametrize(
    ("make", "hook", "value", "words"),
    [
        *[(decoder_whose, x, lambda: None, ["a Keras layer", "None"]) for x in PARTS],
        *[(backbone_whose, x, lambda: None, []) for x in PARTS + WHOLE],
        (decoder_whose, "create_ffn", lambda: "gelu", ["str"]),
        (decoder_whose, "create_norm", lambda: keras.layers.Dense, ["a class Dense"]),
        (decoder_whose, "create_ffn", lambda: keras.ops.gelu, ["function"]),
        (decoder_whose, PARTS[0], uncached, [CACHED, "attention.MultiHeadAttention"]),
        (decoder_whose, PARTS[0], lambda: FeedForward(8), [CACHED]),
        (backbone_whose, "create_decoder", lambda: FeedForward(8), [CACHED]),
        (backbone_whose, PARTS[0], uncached, [CACHED]),
        (
            backbone_whose,
            "create_position_embedding",
            lambda: keras_hub.layers.PositionEmbedding(32),
            [CACHED],
        ),
    ],
)
def test_hooks_that_return_the_wrong_thing(make, hook, value, words):
    owner = "MyDecoder" if make is decoder_whose else "MyBackbone"
    with raises(TypeError, f"`{owner}.{hook}` must return", *words):
        make(hook, value)


def test_a_decoder_class_that_is_no_decoder():
    cls = type("MyBackbone", (CustomBackbone,), {"decoder_class": FeedForward})
    with raises(TypeError, "`MyBackbone.decoder_class` must be", "create_decoder"):
        cls(60, 1, 4, 16, 32)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("intermediate_dim", 0, ValueError),
        ("intermediate_dim", "32", TypeError),
        ("num_heads", -4, ValueError),
        ("num_heads", 4.0, TypeError),
        ("num_key_value_heads", 0, ValueError),
        ("dropout", 1.5, ValueError),
    ],
)
def test_arguments_out_of_range(name, value, kind):
    arguments = {"intermediate_dim": 32, "num_heads": 4, name: value}
    for make in (CustomDecoder, make_backbone):
        with raises(kind, f"`{name}`", f"Received: {name}="):
            make(**arguments)


def backbone_of_a_plain_embedding():
    return backbone_whose("create_embedding", lambda: keras.layers.Embedding(60, 16))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: make_backbone(vocabulary_size=0), ValueError, "vocabulary_size=0"),
        (lambda: make_backbone(num_layers=0), ValueError, "num_layers=0"),
        (lambda: make_backbone(hidden_dim=0), ValueError, "hidden_dim=0"),
        (lambda: make_backbone(dtype="int8_from_float32"), ValueError, "`quantize`"),
        (lambda: make_backbone(dtype="int32"), ValueError, "dtype='int32'"),
        (lambda: FeedForward(0), ValueError, "`intermediate_dim`"),
        (lambda: GatedFeedForward(None), TypeError, "`intermediate_dim`"),
        (
            lambda: make_backbone(num_key_value_heads=3),
            ValueError,
            "divisible by `num_key_value_heads`",
        ),
        (lambda: make_backbone(hidden_dim=18), ValueError, "divisible by `num_heads`"),
        (lambda: CausalLM("gpt2"), TypeError, "`backbone` must be"),
        (lambda: CausalLM(backbone_of_a_plain_embedding()), TypeError, "reverse=True"),
    ],
)
def test_models_that_can_not_be_made(make, kind, words):
    with raises(kind, words):
        make()


TINY = (9, 1, 2, 8, 8)


@pytest.mark.parametrize(
    ("make", "name", "known"),
    [
        (functools.partial(LlamaBackbone, *TINY), "LlamaBackbone", "'rope_theta'"),
        (lambda **x: CausalLM(CustomBackbone(*TINY), **x), "CausalLM", "'compile'"),
        (
            lambda **x: TextClassifier(CustomEncoderBackbone(*TINY), 2, **x),
            "TextClassifier",
            "'pooling'",
        ),
    ],
)
def test_arguments_that_are_not_known(make, name, known):
    with raises(TypeError, f"`{name}` takes no argument `nonsense`", known, "'name'"):
        make(nonsense=3)
    make(name="named", trainable=False)


# === Generation ===


@pytest.fixture(scope="module")
def lm():
    """After all that is refused, it gives what it gave before."""
    lm = make_lm(make_backbone(num_layers=1, max_sequence_length=16))
    before = generated(lm, max_length=16)
    yield lm
    assert generated(lm, max_length=16) == before


@pytest.fixture(scope="module")
def text_lm():
    backbone = make_backbone(num_layers=1, vocabulary_size=256, max_sequence_length=16)
    return make_lm(backbone, byte_preprocessor(sequence_length=8))


def refuse(model, inputs, kind, *words, **options):
    with pytest.raises(kind) as error:
        model.generate(inputs, **{"stop_token_ids": None, **options})
    message = str(error.value)
    # Types and shapes are told, never contents.
    assert all(word in message for word in words), message
    assert not any(word in message for word in ("[[", "array(", "numpy=")), message


X = prompts(RAGGED)
LEFT = {key: value[:, ::-1] for key, value in X.items()}
HOLE = {**prompts([[1, 2, 3, 4]]), "padding_mask": np.array([[1, 0, 1, 1]])}
FLOATS = X["token_ids"].astype("float32")
POSITIONS = ("16 positions", "sequences of 17 tokens", "`max_sequence_length`")
MASK = "Row 0 of `padding_mask`"
SHAPE = "(batch, length)"


def with_token(token):
    tokens = X["token_ids"].astype("int64")
    return {**X, "token_ids": np.where(tokens == 9, token, tokens)}


@pytest.mark.parametrize(
    ("inputs", "options", "kind", "words"),
    [
        # Prompts that are too long.
        (X, {"max_length": 4}, ValueError, ["Prompt 1 has 7", "`max_length` of 4"]),
        (X, {"max_length": 17}, ValueError, POSITIONS),
        (X, {"max_new_tokens": 10}, ValueError, POSITIONS),
        (prompts([list(range(17))]), {}, ValueError, POSITIONS),
        # Prompts without tokens.
        (
            prompts([[1], []]),
            {},
            ValueError,
            ["Prompt 1 has no tokens", "padding_mask"],
        ),
        ({k: v[:0] for k, v in X.items()}, {}, ValueError, ["`token_ids` is empty"]),
        # Prompts that are not padded on the right.
        (LEFT, {}, ValueError, [MASK, "padded on the right"]),
        (HOLE, {}, ValueError, [MASK]),
        # What is no prompt.
        (3, {}, TypeError, ["`inputs` must be", "inputs=3"]),
        (None, {}, TypeError, ["`inputs` must be", "inputs=None"]),
        ([[1, 2], 3], {}, ValueError, ["`inputs` must have the shape (batch, length)"]),
        ("text", {}, ValueError, ["no `preprocessor`"]),
        ({"tokens": FLOATS}, {}, ValueError, ["key `token_ids`", "(3, 7)"]),
        ({**X, "token_ids": FLOATS}, {}, TypeError, ["`token_ids` must be", "float32"]),
        (FLOATS, {}, TypeError, ["`inputs` must be token ids"]),
        ({**X, "padding_mask": FLOATS[:, :3]}, {}, ValueError, ["(3, 7)", "(3, 3)"]),
        ({k: v[None] for k, v in X.items()}, {}, ValueError, [SHAPE]),
        *[
            (with_token(x), {}, ValueError, [f"Token {x} at position 1 of row 1", "60"])
            for x in (-1, 60, 2**33)
        ],
        # Lengths and stop tokens.
        *[
            (X, {name: value}, kind, [f"`{name}` must be a positive integer"])
            for name in ("max_length", "max_new_tokens")
            for value, kind in ((0, ValueError), (-3, ValueError), (4.5, TypeError))
        ],
        *[
            (X, {"stop_token_ids": value}, TypeError, ["`stop_token_ids`"])
            for value in (5.0, "end", [1.5], [[1]])
        ],
        *[
            (X, {"stop_token_ids": value}, ValueError, ["vocabulary of 60"])
            for value in (60, [3, -1])
        ],
        (X, {"stop_token_ids": "auto"}, ValueError, ["no preprocessor"]),
    ],
)
def test_wrong_inputs(lm, inputs, options, kind, words):
    refuse(lm, inputs, kind, *words, **options)


@pytest.mark.parametrize(
    ("inputs", "options", "kind", "words"),
    [
        (["a", "b" * 12], {}, ValueError, ["Prompt 1", "`sequence_length` of 8"]),
        ("abcdef", {"max_length": 3}, ValueError, ["Prompt 0", "`max_length` of 3"]),
        ("", {}, ValueError, ["Prompt 0 has no tokens", "start token"]),
        (["a", ""], {}, ValueError, ["Prompt 1 has no tokens"]),
        ([], {}, ValueError, ["`inputs` is empty"]),
        (
            tf.data.Dataset.from_tensor_slices(["a"]).take(0),
            {},
            ValueError,
            ["dataset without elements"],
        ),
        (["a", 2], {}, TypeError, ["all text or all token ids", "2"]),
        ([["a"], ["b"]], {}, TypeError, ["`inputs` must be token ids", "list("]),
    ],
)
def test_wrong_texts(text_lm, inputs, options, kind, words):
    refuse(text_lm, inputs, kind, *words, **options)


def test_a_tokenizer_of_another_model(lm):
    with raises(ValueError, "tokenizer has 256 tokens", "vocabulary of 60"):
        CausalLM(lm.backbone, byte_preprocessor())


def test_models_that_can_not_generate(lm):
    with raises(TypeError, "`sampler` must be"):
        lm.compile(sampler=3)
    other = CausalLM(lm.backbone, compile=False)
    refuse(other, X, ValueError, "not compiled", max_length=9)
    other.compile(sampler=keras_hub.samplers.BeamSampler(2, return_all_beams=True))
    refuse(other, X, ValueError, "return_all_beams=False", max_length=9)
    uncached = keras_hub.models.GPT2Backbone(60, 1, 2, 8, 16, max_sequence_length=16)
    refuse(make_lm(uncached), X, ValueError, "calls no cached layer")
