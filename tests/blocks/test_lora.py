"""LoRA: what is updated, trained, saved, merged, and read by PEFT."""

import keras
import numpy as np
import pytest

from attention import (
    CachedLayer,
    GatedDeltaNet,
    LatentAttention,
    Mamba2,
    Retention,
    RWKVChannelMix,
    RWKVTimeMix,
    declare_role,
)
from blocks import CausalLM, CustomBackbone
from blocks.models.llama import LlamaBackbone
from blocks.models.phi3 import Phi3Backbone
from tests.helpers import assert_close, raises, to_numpy

pytestmark = pytest.mark.same_everywhere

TOKENS = np.arange(1, 11)[None] % 9 + 1
X = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
SIZES = {"vocabulary_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 16}
SIZES["intermediate_dim"] = 24


def make(cls=CustomBackbone, **kwargs):
    keras.utils.set_random_seed(0)
    return CausalLM(cls(**SIZES, **kwargs))


def with_mixer(create):
    class Backbone(CustomBackbone):
        def create_attention_layer(self, inputs_shape, layer_index):
            return create()

    return make(Backbone)


def disturb(lm):
    """Gives all that is trained other values."""
    rng = np.random.default_rng(0)
    for weight in lm.trainable_weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.3))


def trained(lm):
    """Returns the layers that are updated in the first block."""
    paths = {w.path.rsplit("/", 1)[0] for w in lm.trainable_weights}
    assert all(w.name.startswith("lora_") for w in lm.trainable_weights)
    start = "transformer_layer_0/"
    return sorted(x.removeprefix(start) for x in paths if x.startswith(start))


@pytest.mark.parametrize(
    "target, expected",
    [
        (None, ["self_attention/query", "self_attention/value"]),
        ("key", ["self_attention/key"]),
        (["output", "ffn_output"], ["ffn/output", "self_attention/attention_output"]),
        ("ffn", ["ffn/intermediate", "ffn/output"]),
        (["intermediate"], ["ffn/intermediate"]),
    ],
)
def test_targets(target, expected):
    lm = make()
    lm.enable_lora(2, target)
    assert trained(lm) == expected
    assert len({w.path for w in lm.trainable_weights}) == 4 * len(expected)


@pytest.mark.parametrize(
    "create, expected",
    [
        (lambda: Retention(2), ["query", "value"]),
        (lambda: GatedDeltaNet(2), ["query_key_value"]),
        (lambda: Mamba2(4, state_dim=4), ["input"]),
        (lambda: RWKVTimeMix(2), ["receptance", "value"]),
        (lambda: LatentAttention(4, latent_dim=6), ["latent", "query"]),
    ],
)
def test_targets_in_mixers(create, expected):
    lm = with_mixer(create)
    lm.enable_lora(2)
    assert trained(lm) == [f"self_attention/{name}" for name in expected]
    assert len(trained(with_lora(create, "attention"))) > len(expected)
    assert trained(with_lora(create, "all"))[0].startswith("ffn/")


def with_lora(create, target):
    lm = with_mixer(create)
    lm.enable_lora(2, target)
    return lm


class Own(CachedLayer):
    """An attention-like layer whose projections have names of their own."""

    declared = True

    def build(self, inputs_shape):
        self.wq, self.mix = (keras.layers.Dense(16, name=x) for x in ("wq", "mix"))
        self.wq.build(inputs_shape)
        self.mix.build(inputs_shape)
        if self.declared:
            declare_role(self.wq, "query")

    def create_cache(self, batch_size, max_length):
        return ()

    def call(self, x, padding_mask=None, cache=None, cache_update_index=None):
        outputs = self.mix(self.wq(x))
        return outputs if cache is None else (outputs, cache)


class Undeclared(Own):
    declared = False


def test_a_layer_of_the_user():
    assert trained(with_lora(Own, None)) == ["self_attention/wq"]
    with raises(ValueError, "transformer_layer_0", "'mix', 'wq'", "declare_role"):
        with_lora(Undeclared, None)
    assert trained(with_lora(Undeclared, "mix")) == ["self_attention/mix"]


def test_wrong_arguments():
    lm = make()
    weights = [w.path for w in lm.weights]
    for target in ("wuery", ["query", "wuery"]):
        with raises(ValueError, "wuery", "ffn_input", "query"):
            lm.enable_lora(2, target)
    with raises(TypeError, "`target`"):
        lm.enable_lora(2, [3])
    with raises(ValueError, "`rank`"):
        lm.enable_lora(0)
    with raises(ValueError, "`role` must be one of", "querry"):
        declare_role(keras.layers.Dense(2), "querry")
    assert [w.path for w in lm.weights] == weights
    assert all(w.trainable for w in lm.weights)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_saved_and_merged(alpha, tmp_path):
    lm = make()
    plain = lm.predict(X, verbose=0)
    lm.enable_lora(2, "attention", alpha)
    assert_close(lm.predict(X, verbose=0), plain)
    disturb(lm)
    expected = lm.predict(X, verbose=0)
    assert np.abs(expected - plain).max() > 0.1
    path = str(tmp_path / "updates.lora.h5")
    lm.save_lora_weights(path)
    fresh = make()
    fresh.predict(X, verbose=0)
    version = fresh.weights_version
    fresh.load_lora_weights(path)
    assert fresh.weights_version > version
    assert_close(fresh.predict(X, verbose=0), expected)
    assert trained(fresh) == trained(lm)
    merged = lm.merge_lora()
    assert not any("lora" in w.name for w in merged.weights)
    assert_close(merged.predict(X, verbose=0), expected)
    # A reference that knows nothing of layers: the kernel by its formula.
    query = lm.backbone.transformer_layers[0].self_attention.query_dense
    a, b = map(to_numpy, (query.lora_kernel_a, query.lora_kernel_b))
    old = next(w for w in query.weights if w.name == "kernel")
    (new,) = (
        w
        for w in merged.weights
        if w.path == "transformer_layer_0/self_attention/query/kernel"
    )
    assert_close(new, to_numpy(old) + (alpha or 2) / 2 * np.einsum("dnr,rh->dnh", a, b))


def test_updates_that_do_not_fit(tmp_path):
    lm = make()
    with raises(ValueError, "enable_lora"):
        lm.backbone.save_lora_weights("x.lora.h5")
    lm.enable_lora(2)
    with raises(ValueError, ".lora.h5"):
        lm.backbone.save_lora_weights("x.h5")
    path = str(tmp_path / "updates.lora.h5")
    lm.backbone.save_lora_weights(path)
    other = make()
    other.enable_lora(3)
    with raises(ValueError, "rank 2, here 3"):
        other.backbone.load_lora_weights(path)
    other = make()
    other.enable_lora(2, "key")
    with raises(ValueError, "only one of both"):
        other.backbone.load_lora_weights(path)
    other = CausalLM(CustomBackbone(**{**SIZES, "num_heads": 2}))
    with raises(ValueError, "shape"):
        other.backbone.load_lora_weights(path)
    assert all(w.trainable for w in other.weights)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_base(mode, tmp_path):
    lm = make(LlamaBackbone)
    lm.quantize(mode)
    base = lm.predict(X, verbose=0)
    lm.enable_lora(2, "all")
    assert_close(lm.predict(X, verbose=0), base)
    lm.compile(keras.optimizers.Adam(0.05), sampler="greedy")
    losses = lm.fit(X, np.roll(TOKENS, -1), epochs=9, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.15
    expected = lm.predict(X, verbose=0)
    # Inputs are quantized, too, by int8.
    atol = 0.02 if mode == "int8" else 1e-4
    merged = lm.merge_lora()
    assert {w.dtype for w in merged.weights} == {"float32"}
    assert_close(merged.predict(X, verbose=0), expected, atol=atol)
    lm.export_to_transformers(str(tmp_path))
    loaded = CausalLM.from_preset(str(tmp_path))
    assert_close(loaded.predict(X, verbose=0), merged.predict(X, verbose=0))
    tokens = lm.generate(X["token_ids"][:, :3], max_length=8, stop_token_ids=None)
    assert tokens["token_ids"].shape == (1, 8)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_base_is_loaded_and_trained(mode, tmp_path):
    lm = make(LlamaBackbone)
    lm.quantize(mode)
    lm.save_to_preset(str(tmp_path))
    loaded = CausalLM.from_preset(str(tmp_path))
    # Of int4 Keras rounds the inputs of the head only when it is loaded.
    atol = 1e-5 if mode == "int8" else 0.02
    assert_close(loaded.predict(X, verbose=0), lm.predict(X, verbose=0), atol=atol)
    found = []
    for x in (lm, loaded):
        keras.utils.set_random_seed(0)
        x.enable_lora(2, "all")
        x.compile(keras.optimizers.Adam(0.05))
        losses = x.fit(X, np.roll(TOKENS, -1), epochs=4, verbose=0).history["loss"]
        found.append(losses)
    assert found[0][-1] < found[0][0] - 0.05
    assert_close(*found, atol=atol)


@pytest.mark.skipif(keras.config.backend() != "torch", reason="transformers' is torch")
@pytest.mark.parametrize("cls", [LlamaBackbone, CustomBackbone, Phi3Backbone])
@pytest.mark.parametrize("target", [None, "all"])
def test_peft_reads_updates(cls, target, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import torch

    lm = make(cls)
    lm.export_to_transformers(str(tmp_path / "base"))
    lm.enable_lora(2, target, alpha=3.0)
    disturb(lm)
    lm.export_lora_to_peft(str(tmp_path / "updates"), str(tmp_path / "base"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "updates"))
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits
    assert_close(logits, lm.predict(X, verbose=0), atol=1e-4)


def test_peft_without_updates(tmp_path):
    with raises(ValueError, "enable_lora"):
        make(LlamaBackbone).export_lora_to_peft(str(tmp_path))


def test_a_feed_forward_of_rwkv():
    class Backbone(CustomBackbone):
        def create_ffn(self, inputs_shape, layer_index):
            return RWKVChannelMix(24)

    lm = make(Backbone)
    lm.enable_lora(2, "ffn")
    assert trained(lm) == ["ffn/key", "ffn/value"]
