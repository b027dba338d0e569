"""Language models of other mixers, and of several: generated as without a cache."""

import keras
import numpy as np
import pytest

from attention import RWKVChannelMix, RWKVTimeMix, create_cache
from blocks import CausalLM, CustomBackbone, CustomDecoder
from tests.helpers import assert_close, slow
from tests.models import (
    Scripted,
    brute_force_greedy,
    check_generation,
    generated,
    make_backbone,
    make_small_lm,
    make_variant,
)

LAYERS = {"hybrid": 4, "local_and_global": 6}
RECURRENT = ("retention", "mamba2", "gated_delta_net", "rwkv")


class RWKVBlock(CustomDecoder):
    """Two mixers, and the first block's values, which the others take."""

    def __init__(self, is_first, **kwargs):
        super().__init__(**kwargs)
        self.is_first = is_first

    def create_attention_layer(self, inputs_shape):
        return RWKVTimeMix(self.num_heads, value_residual=not self.is_first)

    def create_ffn(self, inputs_shape):
        return RWKVChannelMix(self.intermediate_dim)

    def transform(self, x, first_value=None, padding_mask=None, training=None):
        further = {} if self.is_first else {"first_value": first_value}
        found, value = self.self_attention(
            self.attention_norm(x),
            return_value=True,
            padding_mask=padding_mask,
            **further,
        )
        x = x + found
        return x + self.ffn(self.ffn_norm(x)), value


class RWKVBackbone(CustomBackbone):
    def create_decoder(self, layer_index):
        return RWKVBlock(
            layer_index == 0,
            intermediate_dim=self.intermediate_dim,
            num_heads=self.num_heads,
        )

    def transform(self, x, padding_mask):
        first, *others = self.transformer_layers
        x, value = first(x, padding_mask=padding_mask)
        for block in others:
            x, _ = block(x, value, padding_mask=padding_mask)
        return x


def make(name, **overrides):
    if name == "rwkv":
        return make_backbone(RWKVBackbone, learned_positions=False, **overrides)
    return make_variant(name, **{"num_layers": LAYERS.get(name, 2), **overrides})


MODELS = ["latent", "differential", *LAYERS, *RECURRENT]
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize("name", [x if x == "hybrid" else slow(x) for x in MODELS])
def test_generation_equals_no_cache_at_all(name):
    check_generation(make_small_lm(make(name)), max_length=16)


@pytest.mark.slow
@every_model
def test_speculation_and_sessions(name):
    lm = make_small_lm(make(name))
    first, more = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3]
    options = {"stop_token_ids": None, "max_new_tokens": 9}
    (expected,) = brute_force_greedy(lm, [first], 17)
    guess = Scripted([expected], 3, wrong=3)
    found = generated(lm, [first], max_new_tokens=9, speculation=guess)
    assert found == [expected]
    session = lm.start({"token_ids": first, "padding_mask": [1] * len(first)})
    session.generate(None, **options)
    fork = session.fork()
    session.generate({"token_ids": more, "padding_mask": [1, 1]}, **options)
    fork.generate(None, **{**options, "max_new_tokens": 4})
    whole = brute_force_greedy(lm, [[*expected, *more], expected], [28, 21])
    assert [x.tokens[0].tolist() for x in (session, fork)] == whole


@pytest.mark.slow
@every_model
def test_only_attention_to_everything_needs_more_for_longer_sequences(name):
    backbone = make(name, hidden_dim=8)
    short, long = (
        sum(np.prod(x.shape) for x in keras.tree.flatten(create_cache(backbone, 2, n)))
        for n in (64, 4096)
    )
    assert (long == short) == (name in RECURRENT)
    if name in LAYERS:
        # One layer's keys and values of two heads of two numbers, in two rows.
        assert long - short == (4096 - 64) * 2 * 2 * 2 * 2


@pytest.mark.parametrize("name", ["hybrid", "mamba2"])
@pytest.mark.slow
def test_they_learn_and_are_saved(name, tmp_path):
    lm = make_small_lm(make(name, num_layers=LAYERS.get(name, 1)))
    tokens = np.random.default_rng(0).integers(1, 9, (16, 10)).astype("int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    losses = lm.fit(inputs, tokens, epochs=3, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    lm.save_to_preset(str(tmp_path / "preset"))
    restored = CausalLM.from_preset(str(tmp_path / "preset"))
    assert_close(restored(inputs), lm(inputs))
