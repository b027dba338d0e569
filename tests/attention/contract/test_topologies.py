"""The topologies of `examples/topologies.py`: what is special to each."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import call_with_cache, create_cache
from attention.testing import check_cached_layer, check_cached_model
from blocks import CausalLM, CustomDecoder
from tests.helpers import assert_close, gradients, load_example, raises, sample
from tests.models import (
    VOCABULARY_SIZE,
    check_generation,
    make_backbone,
    make_lm,
    to_numpy,
)

example = load_example("topologies")
TOPOLOGIES = [name for name in example.TOPOLOGIES if name != "stock"]
LENGTH = 12

every_topology = pytest.mark.parametrize("name", TOPOLOGIES)


def make(name, **overrides):
    arguments = {"num_layers": 3, "num_key_value_heads": 2, **overrides}
    return make_backbone(example.TOPOLOGIES[name], **arguments)


def sample_inputs():
    tokens = np.random.default_rng(0).integers(1, VOCABULARY_SIZE, (3, LENGTH))
    tokens = tokens.astype("int32")
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}


# === The same in training and in decoding ===


@pytest.mark.slow
@every_topology
def test_the_kit(name):
    # Sharing across depth takes two blocks.
    layers = 2 if name in ("albert", "shared_key_value") else 1
    check_cached_model(lambda: make(name, num_layers=layers), max_length=9)


@every_topology
def test_gradients_reach_all_weights(name):
    backbone = make(name)
    inputs = {key: ops.convert_to_tensor(x) for key, x in sample_inputs().items()}
    paths = [weight.path for weight in backbone.trainable_weights]
    for path, gradient in zip(paths, gradients(backbone, inputs), strict=True):
        assert np.isfinite(gradient).all(), path
        # A bias of all keys alike changes no attention weight.
        if not path.endswith("self_attention/key/bias"):
            assert np.abs(gradient).max() > 1e-6, path


@every_topology
@pytest.mark.slow
def test_generation_equals_no_cache_at_all(name):
    check_generation(make_lm(make(name)))


@pytest.mark.parametrize("name", ["albert", "shared_key_value"])
@pytest.mark.slow
def test_saved_models_say_the_same(name, tmp_path):
    lm = make_lm(make(name))
    inputs = sample_inputs()
    expected = to_numpy(lm(inputs))
    lm.save(tmp_path / "lm.keras")
    assert_close(keras.models.load_model(tmp_path / "lm.keras")(inputs), expected)
    lm.save_to_preset(str(tmp_path / "preset"))
    restored = CausalLM.from_preset(str(tmp_path / "preset"))
    assert type(restored.backbone) is example.TOPOLOGIES[name]
    assert_close(restored(inputs), expected)
    # The blocks of a model that was loaded know their call sites.
    head, _ = call_with_cache(
        restored.backbone, inputs, create_cache(restored.backbone, 3, LENGTH), 0
    )
    assert_close(head, lm.backbone(inputs))


# === Which weights are stored, and how often ===


def elements(backbone, length=LENGTH):
    cache = create_cache(backbone, 1, length)
    return sum(int(np.prod(x.shape)) for x in keras.tree.flatten(cache))


def test_shared_keys_and_values_are_stored_once():
    width = 16
    assert elements(make("shared_key_value")) == 2 * (width // 2) * LENGTH
    assert elements(make("shared_key_value", num_layers=6)) == width * LENGTH
    backbone = make("shared_key_value")
    # The position embedding has no state, nor have the readers.
    _, producer, *readers = create_cache(backbone, 1, LENGTH)
    assert producer[0]["key"].shape[1] == 2
    assert readers == [((),), ((),)]
    readers = backbone.transformer_layers[1:]
    paths = [weight.path for reader in readers for weight in reader.weights]
    assert not any("/key/" in path or "/value/" in path for path in paths)


def test_each_call_has_a_cache_of_its_own():
    albert, single = make("albert"), make("albert", num_layers=1)
    assert len({id(block) for block in albert.transformer_layers}) == 1
    assert elements(albert) == 3 * elements(single)
    assert albert.count_params() == single.count_params()
    assert elements(make("twice")) == 2 * elements(make("parallel"))
    # A token shift keeps one token, however long the sequence is.
    for length in (8, 64):
        shifted, plain = make("token_shift"), make("sandwich")
        assert elements(shifted, length) - elements(plain, length) == 3 * 16


def test_the_parallel_block_is_what_it_says():
    block = make("parallel").transformer_layers[0]
    x = ops.convert_to_tensor(sample())
    h = block.norm(x)
    assert_close(block(x), x + block.self_attention(h) + block.ffn(h))
    assert not hasattr(block, "ffn_norm")
    weights = make("sandwich").transformer_layers[1].weights
    names = {w.path.split("/")[-2] for w in weights if w.path.endswith("/scale")}
    parts = ("attention_norm", "ffn_norm", "attention_post_norm", "ffn_post_norm")
    assert names == set(parts)


# === norm_names ===


@pytest.mark.parametrize(
    "names, kind, parts",
    [
        (["attention_norm"], TypeError, ["a tuple of names", "['attention_norm']"]),
        ("attention_norm", TypeError, ["a tuple of names"]),
        (("attention norm",), TypeError, ["attention norm"]),
        ((1,), TypeError, ["norm_names=(1,)"]),
        (("norm", "norm"), ValueError, ["distinct"]),
        (("norm", "ffn"), ValueError, ["['ffn'] are taken"]),
        (("num_heads", "build"), ValueError, ["['build', 'num_heads'] are taken"]),
        (("max_sequence_length",), ValueError, ["max_sequence_length"]),
    ],
)
def test_norm_names_are_checked(names, kind, parts):
    class Decoder(CustomDecoder):
        norm_names = names

    with raises(kind, "Decoder.norm_names", *parts):
        Decoder(32, 4).build((None, None, 16))


def test_a_block_without_norms():
    class Bare(CustomDecoder):
        norm_names = ()

        def transform(self, x, padding_mask=None):
            return x + self.ffn(self.self_attention(x))

    check_cached_layer(lambda: Bare(32, 4), max_length=8, checks="chunks")


# === Values that flow between blocks ===


def test_a_backbone_that_forgets_the_keys_is_told():
    class Forgetful(example.SharedKeyValueBackbone):
        def transform(self, x, padding_mask):
            producer, *readers = self.transformer_layers
            x, _ = producer(x, padding_mask=padding_mask)
            for reader in readers:
                x = reader(x, padding_mask=padding_mask)
            return x

    with raises(TypeError, "without ['key_value']", "ReaderDecoder.transform"):
        make_backbone(Forgetful)
