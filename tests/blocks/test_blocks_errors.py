"""Bad input to blocks, backbones and `generate`: clear errors, nothing lost."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from blocks import (
    CausalLM,
    CustomBackbone,
    CustomDecoder,
    FeedForward,
    GatedFeedForward,
)
from tests.helpers import raises
from tests.models import (
    RAGGED,
    byte_preprocessor,
    make_backbone,
    make_lm,
    prompts,
    rows_of,
)

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


@pytest.mark.parametrize(
    ("make", "hook", "value", "words"),
    [
        *[(decoder_whose, x, lambda: None, ["a Keras layer", "None"]) for x in PARTS],
        *[(backbone_whose, x, lambda: None, []) for x in PARTS + WHOLE],
        (decoder_whose, "create_ffn", lambda: "gelu", ["str"]),
        (decoder_whose, "create_norm", lambda: keras.layers.Dense, ["a class Dense"]),
        (decoder_whose, "create_ffn", lambda: keras.ops.gelu, ["function"]),
        (
            decoder_whose,
            "create_attention_layer",
            uncached,
            ["`create_cache`", "attention.MultiHeadAttention"],
        ),
        (
            decoder_whose,
            "create_attention_layer",
            lambda: FeedForward(8),
            ["`create_cache`"],
        ),
        (backbone_whose, "create_decoder", lambda: FeedForward(8), ["create_cache"]),
        (backbone_whose, "create_attention_layer", uncached, ["create_cache"]),
        (
            backbone_whose,
            "create_position_embedding",
            lambda: keras_hub.layers.PositionEmbedding(32),
            ["create_cache"],
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


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: make_backbone(vocabulary_size=0), ValueError, ["vocabulary_size=0"]),
        (lambda: make_backbone(num_layers=0), ValueError, ["num_layers=0"]),
        (lambda: make_backbone(hidden_dim=0), ValueError, ["hidden_dim=0"]),
        (lambda: FeedForward(0), ValueError, ["`intermediate_dim`"]),
        (lambda: GatedFeedForward(None), TypeError, ["`intermediate_dim`"]),
        (
            lambda: make_backbone(num_key_value_heads=3),
            ValueError,
            ["divisible by `num_key_value_heads`"],
        ),
        (
            lambda: make_backbone(hidden_dim=18),
            ValueError,
            ["divisible by `num_heads`"],
        ),
        (lambda: CausalLM("gpt2"), TypeError, ["`backbone` must be"]),
        (
            lambda: CausalLM(
                backbone_whose(
                    "create_embedding", lambda: keras.layers.Embedding(60, 16)
                )
            ),
            TypeError,
            ["reverse=True"],
        ),
    ],
)
def test_models_that_can_not_be_made(make, kind, words):
    with raises(kind, *words):
        make()


# === Generation ===


@pytest.fixture(scope="module")
def lm():
    return make_lm(make_backbone(num_layers=1, max_sequence_length=16))


@pytest.fixture(scope="module")
def text_lm():
    backbone = make_backbone(num_layers=1, vocabulary_size=256, max_sequence_length=16)
    return make_lm(backbone, byte_preprocessor(sequence_length=8))


@pytest.fixture(autouse=True)
def nothing_is_lost(request):
    """Whatever was refused, the next call gives what the first gave."""
    if "lm" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("lm")
    x = prompts([[1, 2, 3]])
    before = rows_of(model.generate(x, stop_token_ids=None, max_length=9))
    yield
    assert rows_of(model.generate(x, stop_token_ids=None, max_length=9)) == before


def refuse(model, inputs, kind, *words, **kwargs):
    kwargs.setdefault("stop_token_ids", None)
    with pytest.raises(kind) as error:
        model.generate(inputs, **kwargs)
    message = str(error.value)
    for word in words:
        assert word in message, message
    # Types and shapes are told, never contents.
    assert "[[" not in message
    assert "array(" not in message
    assert "numpy=" not in message


def test_prompts_that_are_too_long(lm, text_lm):
    x = prompts([[1, 2], [1, 2, 3, 4, 5]])
    words = ("Prompt 1 has 5 tokens", "`max_length` of 4")
    refuse(lm, x, ValueError, *words, max_length=4)
    words = ("Prompt 1", "`sequence_length` of 8", "larger `max_length`")
    refuse(text_lm, ["a", "abcdefghijkl"], ValueError, *words)
    refuse(text_lm, "abcdef", ValueError, "Prompt 0", "`max_length` of 3", max_length=3)
    # More than the learned positions.
    x = prompts([[1, 2, 3]])
    words = ("16 positions", "sequences of 17 tokens", "`max_sequence_length`")
    refuse(lm, x, ValueError, *words, max_length=17)
    refuse(lm, x, ValueError, *words, max_new_tokens=14)
    refuse(lm, prompts([list(range(17))]), ValueError, *words)
    outputs = lm.generate(x, stop_token_ids=None, max_length=16)
    assert len(rows_of(outputs)[0]) == 16


@pytest.mark.parametrize("token", [-1, 60, 2**33])
def test_tokens_outside_of_the_vocabulary(lm, token):
    x = prompts([[1, 2], [3, 4]])
    x["token_ids"] = x["token_ids"].astype("int64")
    x["token_ids"][1, 1] = token
    words = (f"Token {token} at position 1 of row 1", "vocabulary of 60")
    refuse(lm, x, ValueError, *words, max_length=8)


def test_a_tokenizer_of_another_model(lm):
    with raises(ValueError, "tokenizer has 256 tokens", "vocabulary of 60"):
        CausalLM(lm.backbone, byte_preprocessor())


def test_empty_prompts(lm, text_lm):
    refuse(text_lm, "", ValueError, "Prompt 0 has no tokens", "start token")
    refuse(text_lm, ["a", ""], ValueError, "Prompt 1 has no tokens")
    refuse(lm, prompts([[1], []]), ValueError, "Prompt 1 has no tokens", "padding_mask")
    refuse(text_lm, [], ValueError, "`inputs` is empty")
    empty = {k: v[:0] for k, v in prompts(RAGGED).items()}
    refuse(lm, empty, ValueError, "`token_ids` is empty")
    dataset = tf.data.Dataset.from_tensor_slices(["a"]).take(0)
    refuse(text_lm, dataset, ValueError, "dataset without elements")


def test_prompts_that_are_padded_on_the_left(lm):
    x = {key: value[:, ::-1] for key, value in prompts(RAGGED).items()}
    refuse(lm, x, ValueError, "Row 0 of `padding_mask`", "padded on the right")
    x = prompts([[1, 2, 3, 4]])
    x["padding_mask"][0, 1] = 0
    refuse(lm, x, ValueError, "Row 0 of `padding_mask`")


def test_wrong_inputs(lm, text_lm):
    refuse(lm, 3, TypeError, "`inputs` must be", "inputs=3")
    refuse(lm, None, TypeError, "`inputs` must be", "inputs=None")
    refuse(text_lm, ["a", 2], TypeError, "all text or all token ids", "2")
    refuse(text_lm, [["a"], ["b"]], TypeError, "`inputs` must be token ids", "list(")
    refuse(lm, [[1, 2], 3], ValueError, "`inputs` must have the shape (batch, length)")
    refuse(lm, "text", ValueError, "no `preprocessor`")
    x = prompts(RAGGED)
    refuse(lm, {"tokens": x["token_ids"]}, ValueError, "key `token_ids`", "(3, 7)")
    floats = {**x, "token_ids": x["token_ids"].astype("float32")}
    refuse(lm, floats, TypeError, "`token_ids` must be token ids", "float32")
    refuse(lm, floats["token_ids"], TypeError, "`inputs` must be token ids")
    narrow = {**x, "padding_mask": x["padding_mask"][:, :3]}
    refuse(lm, narrow, ValueError, "(3, 7)", "(3, 3)")
    deep = {key: value[None] for key, value in x.items()}
    refuse(lm, deep, ValueError, "(batch, length)")


def test_wrong_lengths_and_stop_tokens(lm):
    x = prompts(RAGGED)
    for name in ("max_length", "max_new_tokens"):
        for value, kind in ((0, ValueError), (-3, ValueError), (4.5, TypeError)):
            refuse(lm, x, kind, f"`{name}` must be a positive integer", **{name: value})
    for value in (5.0, "end", [1.5], [[1]]):
        refuse(lm, x, TypeError, "`stop_token_ids`", stop_token_ids=value)
    for value in (60, [3, -1]):
        refuse(lm, x, ValueError, "vocabulary of 60", stop_token_ids=value)
    refuse(lm, x, ValueError, "no preprocessor", stop_token_ids="auto")


def test_samplers_that_do_not_fit(lm):
    with pytest.raises(TypeError, match="`sampler` must be"):
        lm.compile(sampler=3)
    other = CausalLM(lm.backbone)
    sampler = keras_hub.samplers.BeamSampler(num_beams=2, return_all_beams=True)
    other.compile(sampler=sampler)
    refuse(other, prompts(RAGGED), ValueError, "return_all_beams=False", max_length=9)
    other.compile(sampler=keras_hub.samplers.SpeculativeSampler())
    refuse(other, prompts(RAGGED), ValueError, "SpeculativeSampler", max_length=9)


def test_models_that_can_not_generate(lm):
    other = CausalLM(lm.backbone, compile=False)
    refuse(other, prompts(RAGGED), ValueError, "not compiled", max_length=9)
    uncached = keras_hub.models.GPT2Backbone(60, 1, 2, 8, 16, max_sequence_length=16)
    refuse(make_lm(uncached), prompts(RAGGED), ValueError, "calls no cached layer")
