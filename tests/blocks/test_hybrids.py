"""Language models of other mixers, and of several: generated as without a cache."""

import keras
import numpy as np
import pytest

from attention import (
    DifferentialAttention,
    GatedDeltaNet,
    LatentAttention,
    Mamba2,
    Retention,
    RotaryAttention,
    RotaryPosition,
    RWKVChannelMix,
    RWKVTimeMix,
    create_cache,
)
from blocks import CausalLM, CustomBackbone, CustomDecoder, Speculation
from tests.helpers import slow
from tests.models import (
    PACKAGE,
    RAGGED,
    VOCABULARY_SIZE,
    brute_force_greedy,
    make_backbone,
    make_small_lm,
    prompts,
    rows_of,
)

MIXERS = {
    "latent": lambda heads, i: LatentAttention(heads, latent_dim=8, rotary_dim=2),
    "differential": lambda heads, i: DifferentialAttention(
        heads // 2, position=RotaryPosition()
    ),
    "retention": lambda heads, i: Retention(heads),
    "mamba2": lambda heads, i: Mamba2(heads, state_dim=4),
    "gated_delta_net": lambda heads, i: GatedDeltaNet(heads),
    # Three recurrent layers to one of attention.
    "hybrid": lambda heads, i: (
        RotaryAttention(heads, 2) if i % 4 == 3 else GatedDeltaNet(heads)
    ),
    # Five windows to one layer that sees everything.
    "local_and_global": lambda heads, i: RotaryAttention(
        heads, 2, window=None if i % 6 == 5 else 4
    ),
}
LAYERS = {"hybrid": 4, "local_and_global": 6}


@keras.saving.register_keras_serializable(package=PACKAGE)
class MixerBackbone(CustomBackbone):
    def __init__(self, mixer, **kwargs):
        self.mixer = mixer
        super().__init__(learned_positions=False, **kwargs)

    def create_attention_layer(self, inputs_shape, layer_index):
        return MIXERS[self.mixer](self.num_heads, layer_index)

    def get_config(self):
        config = {**super().get_config(), "mixer": self.mixer}
        del config["learned_positions"]
        return config


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
    layers = LAYERS.get(name, 2)
    return make_backbone(
        MixerBackbone, mixer=name, **{"num_layers": layers, **overrides}
    )


every_model = pytest.mark.parametrize("name", [*MIXERS, "rwkv"])


@every_model
def test_generation_equals_no_cache_at_all(name):
    lm = make_small_lm(make(name))
    outputs = lm.generate(prompts(RAGGED), stop_token_ids=None, max_new_tokens=9)
    limits = [len(row) + 9 for row in RAGGED]
    assert rows_of(outputs) == brute_force_greedy(lm, RAGGED, limits, width=18)


class Guess(Speculation):
    """Guesses what comes, and in every third place something else."""

    def __init__(self, expected):
        super().__init__(3)
        self.expected = expected

    def propose(self, memory, rows):
        guess = np.array(self.expected[len(rows[0]) :][: self.num_tokens], "int32")
        places = len(rows[0]) + np.arange(len(guess))
        return [np.where(places % 3 == 0, (guess + 1) % VOCABULARY_SIZE, guess)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MIXERS, "rwkv"])
def test_speculation_and_sessions(name):
    lm = make_small_lm(make(name))
    first, more = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3]
    options = {"stop_token_ids": None, "max_new_tokens": 9}
    expected = brute_force_greedy(lm, [first], [17], width=26)[0]
    found = lm.generate(prompts([first]), **options, speculation=Guess(expected))
    assert rows_of(found) == [expected]
    session = lm.start({"token_ids": first, "padding_mask": [1] * len(first)})
    session.generate(None, **options)
    fork = session.fork()
    session.generate({"token_ids": more, "padding_mask": [1, 1]}, **options)
    fork.generate(None, **{**options, "max_new_tokens": 4})
    whole = brute_force_greedy(lm, [[*expected, *more], expected], [28, 21], width=28)
    assert session.tokens[0].tolist() == whole[0]
    assert fork.tokens[0].tolist() == whole[1]


def elements(backbone, length):
    leaves = keras.tree.flatten(create_cache(backbone, 2, length))
    return sum(int(np.prod(x.shape)) for x in leaves)


@every_model
def test_only_attention_to_everything_needs_more_for_longer_sequences(name):
    backbone = make(name, hidden_dim=8)
    short, long = elements(backbone, 64), elements(backbone, 4096)
    recurrent = ("retention", "mamba2", "gated_delta_net", "rwkv")
    assert (long == short) == (name in recurrent)
    if name in ("hybrid", "local_and_global"):
        # One layer's keys and values of two heads of two numbers, in two rows.
        assert long - short == (4096 - 64) * 2 * 2 * 2 * 2


@pytest.mark.parametrize("name", [slow("hybrid"), "mamba2"])
def test_they_learn_and_are_saved(name, tmp_path):
    lm = make_small_lm(make(name, num_layers=4 if name == "hybrid" else 1))
    tokens = np.random.default_rng(0).integers(1, 9, (16, 10)).astype("int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    history = lm.fit(inputs, tokens, epochs=3, batch_size=8, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    lm.save_to_preset(str(tmp_path / "preset"))
    restored = CausalLM.from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(
        *(keras.ops.convert_to_numpy(x(inputs)) for x in (lm, restored)), atol=1e-5
    )
