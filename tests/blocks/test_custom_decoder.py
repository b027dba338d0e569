"""`CustomDecoder`: hooks, topologies, dtypes, names and saving."""

import types

import keras
import numpy as np
import pytest

import attention
from attention import MultiHeadAttention, call_sites
from blocks import CustomDecoder, FeedForward, GatedFeedForward
from tests.models import PACKAGE, randomize, to_numpy

WIDTH = 16


def make_inputs(batch=2, length=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, length, WIDTH)).astype("float32")


def make_block(cls=CustomDecoder, **kwargs):
    arguments = {"intermediate_dim": 32, "num_heads": 4, **kwargs}
    block = cls(**arguments)
    block.build((None, None, WIDTH))
    randomize(block)
    return block


def check_cached_equals_uncached(block, atol=1e-5):
    """One prefill, then rows at different positions, one token at a time."""
    x = make_inputs()
    full = to_numpy(block(x))
    cache = block.create_cache(batch_size=2, max_length=6)
    head, cache = block(x[:, :4], cache=cache, cache_update_index=0)
    np.testing.assert_allclose(to_numpy(head), full[:, :4], atol=atol)
    for i in (4, 5):
        step, cache = block(x[:, i : i + 1], cache=cache, cache_update_index=i)
        np.testing.assert_allclose(to_numpy(step), full[:, i : i + 1], atol=atol)

    lengths = np.array([2, 5], "int32")
    mask = np.arange(5)[None] < lengths[:, None]
    cache = block.create_cache(batch_size=2, max_length=6)
    _, cache = block(x[:, :5], padding_mask=mask, cache=cache, cache_update_index=0)
    token = np.stack([x[0, 2:3], x[1, 5:6]])
    step, cache = block(token, cache=cache, cache_update_index=lengths)
    np.testing.assert_allclose(to_numpy(step)[0, 0], full[0, 2], atol=atol)
    np.testing.assert_allclose(to_numpy(step)[1, 0], full[1, 5], atol=atol)


# === The discussion's snippet ===

SNIPPET = """
class CustomDecoder(keras_nlp.layers.CustomDecoder):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def create_attention_layer(self, inputs_shape):
        # Override the default MultiHeadAttention here.
        # Examples, RoPE embeddings, multi-query, T5 style trainable bias, etc.
        return keras.layers.CustomAttention(
            num_heads=self.num_heads,
            key_dim=int(inputs_shape[-1] // self.num_heads),
            dropout=self.dropout,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
        )
"""


def test_the_snippet_of_the_discussion_runs_as_written():
    import blocks

    namespace = {
        "keras_nlp": types.SimpleNamespace(layers=blocks),
        "keras": types.SimpleNamespace(
            layers=types.SimpleNamespace(CustomAttention=attention.MultiHeadAttention)
        ),
        "clone_initializer": blocks.clone_initializer,
    }
    exec(SNIPPET, namespace)
    block = make_block(namespace["CustomDecoder"], dropout=0.1)
    assert type(block.self_attention) is MultiHeadAttention
    assert block.self_attention.key_dim == WIDTH // 4
    assert block.self_attention.dropout == 0.1
    check_cached_equals_uncached(block)


# === Hooks ===


class GatedRmsDecoder(CustomDecoder):
    def create_ffn(self, inputs_shape):
        assert tuple(inputs_shape)[-1] == WIDTH
        return GatedFeedForward(self.intermediate_dim, activation="gelu")

    def create_norm(self, inputs_shape):
        return keras.layers.RMSNormalization()


class SublayersDecoder(CustomDecoder):
    """A feed-forward layer as people write them: sublayers, and no `build`."""

    def create_ffn(self, inputs_shape):
        class Mlp(keras.layers.Layer):
            def __init__(self, intermediate_dim, width):
                super().__init__()
                self.up = keras.layers.Dense(intermediate_dim, activation="relu")
                self.down = keras.layers.Dense(width)

            def call(self, x):
                return self.down(self.up(x))

        return Mlp(self.intermediate_dim, inputs_shape[-1])


class SequentialDecoder(CustomDecoder):
    def create_ffn(self, inputs_shape):
        return keras.Sequential(
            [
                keras.layers.Dense(self.intermediate_dim, activation="relu"),
                keras.layers.Dense(inputs_shape[-1]),
            ]
        )


@pytest.mark.parametrize("cls", [GatedRmsDecoder, SublayersDecoder, SequentialDecoder])
@pytest.mark.filterwarnings("error:.*does not have a `build:UserWarning")
def test_hooks_change_the_parts(cls):
    block = make_block(cls)
    assert len(block.ffn.weights) > 2
    check_cached_equals_uncached(block)


def test_num_key_value_heads_and_activation():
    block = make_block(num_key_value_heads=2, activation="relu")
    assert block.create_cache(1, 8)[0]["key"].shape[1] == 2
    assert block.ffn.activation is keras.activations.relu
    check_cached_equals_uncached(block)


def test_initializers_reach_the_layers():
    block = CustomDecoder(32, 4, kernel_initializer="zeros", bias_initializer="ones")
    block.build((None, None, WIDTH))
    for layer in (block.self_attention.query_dense, block.ffn.intermediate_dense):
        assert np.all(to_numpy(layer.kernel) == 0)
        assert np.all(to_numpy(layer.bias) == 1)
    block = CustomDecoder(
        16, 4, kernel_initializer=keras.initializers.RandomNormal(seed=3)
    )
    block.build((None, None, WIDTH))
    # A seeded initializer fills each layer as it would fill any other.
    assert block.kernel_initializer is not block.ffn.kernel_initializer


# === Topologies ===


class ParallelDecoder(CustomDecoder):
    def transform(self, x, padding_mask=None, training=None):
        h = self.attention_norm(x)
        return x + self.self_attention(h, padding_mask=padding_mask) + self.ffn(h)


class SandwichDecoder(CustomDecoder):
    def build(self, inputs_shape):
        super().build(inputs_shape)
        self.after = keras.layers.RMSNormalization(name="after")
        self.after.build(inputs_shape)

    def transform(self, x, padding_mask=None, training=None):
        h = self.self_attention(self.attention_norm(x), padding_mask=padding_mask)
        x = x + self.after(h)
        return x + self.ffn(self.ffn_norm(x))


class TwiceDecoder(CustomDecoder):
    """One attention layer at two places; the mask is left to the block."""

    def transform(self, x):
        for _ in range(2):
            x = x + self.self_attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


@pytest.mark.parametrize("cls", [ParallelDecoder, SandwichDecoder, TwiceDecoder])
def test_topologies_are_written_once(cls):
    block = make_block(cls)
    check_cached_equals_uncached(block)
    assert len(block.create_cache(1, 4)) == (2 if cls is TwiceDecoder else 1)


def test_normalize_first_false():
    block = make_block(normalize_first=False)
    check_cached_equals_uncached(block)
    x = keras.ops.convert_to_tensor(make_inputs())
    attended = block.attention_norm(x + block.self_attention(x))
    expected = block.ffn_norm(attended + block.ffn(attended))
    np.testing.assert_allclose(to_numpy(block(x)), to_numpy(expected), atol=1e-5)
    # The norms come last: there is no other way for the outputs to be normal.
    for norm in (block.attention_norm, block.ffn_norm):
        norm.gamma.assign(np.ones(WIDTH))
        norm.beta.assign(np.zeros(WIDTH))
    np.testing.assert_allclose(to_numpy(block(x)).mean(axis=-1), 0, atol=1e-5)


def test_normalize_first_true():
    block = make_block()
    x = keras.ops.convert_to_tensor(make_inputs())
    h = x + block.self_attention(block.attention_norm(x))
    expected = h + block.ffn(block.ffn_norm(h))
    np.testing.assert_allclose(to_numpy(block(x)), to_numpy(expected), atol=1e-5)


def test_padding_changes_no_real_token():
    block = make_block()
    x = make_inputs()
    mask = np.arange(6)[None] < np.array([[3], [6]])
    masked = to_numpy(block(x, padding_mask=mask))
    other = x.copy()
    other[0, 3:] = 1e3
    np.testing.assert_allclose(
        to_numpy(block(other, padding_mask=mask))[0, :3], masked[0, :3], atol=1e-5
    )
    np.testing.assert_allclose(to_numpy(block(x[:1, :3]))[0], masked[0, :3], atol=1e-5)


def test_dropout_acts_in_training_only():
    block = make_block(dropout=0.5)
    x = make_inputs()
    plain = to_numpy(block(x))
    np.testing.assert_array_equal(to_numpy(block(x, training=False)), plain)
    first = to_numpy(block(x, training=True))
    second = to_numpy(block(x, training=True))
    assert np.abs(first - plain).max() > 0.1
    assert np.abs(first - second).max() > 0.1
    check_cached_equals_uncached(block)


# === Names and dtypes ===


def test_names_are_those_of_the_places():
    paths = [
        {w.path.removeprefix(block.name) for w in block.weights}
        for block in (make_block(), make_block())
    ]
    assert paths[0] == paths[1]
    assert "/self_attention/query/kernel" in paths[0]
    assert "/attention_norm/gamma" in paths[0]
    assert "/ffn/intermediate/kernel" in paths[0]
    assert "/ffn_norm/beta" in paths[0]


class ForgetfulDecoder(CustomDecoder):
    """Its hooks don't say `dtype=`, and the feed-forward layer has sublayers."""

    create_ffn = SublayersDecoder.create_ffn


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_a_hook_that_forgets_the_dtype_has_the_blocks(dtype):
    before = keras.config.dtype_policy()
    block = make_block(ForgetfulDecoder, dtype=dtype)
    assert keras.config.dtype_policy() is before
    for layer in (
        block.self_attention,
        block.self_attention.query_dense,
        block.ffn.up,
        block.attention_norm,
        block.residual_dropout,
    ):
        assert layer.dtype_policy.name == dtype
    outputs = block(make_inputs())
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    variable_dtype = "float32" if dtype.startswith("mixed") else "bfloat16"
    assert {w.dtype for w in block.weights if "seed" not in w.path} == {variable_dtype}
    cache = block.create_cache(1, 4)
    assert keras.backend.standardize_dtype(cache[0]["key"].dtype) == "bfloat16"


def test_a_float32_block_under_a_global_bfloat16_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    block = make_block(ForgetfulDecoder, dtype="float32")
    assert block.ffn.up.compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "mixed_bfloat16"


class FailingDecoder(CustomDecoder):
    def create_norm(self, inputs_shape):
        raise RuntimeError("no norm today")


def test_the_policy_is_restored_when_a_hook_fails():
    before = keras.config.dtype_policy()
    with pytest.raises(RuntimeError, match="no norm today"):
        make_block(FailingDecoder, dtype="bfloat16")
    assert keras.config.dtype_policy() is before


# === Saving ===


@keras.saving.register_keras_serializable(package=PACKAGE)
class WindowlessDecoder(CustomDecoder):
    """A subclass with an argument and a hook of its own."""

    def __init__(self, *args, gain=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = gain

    def create_attention_layer(self, inputs_shape):
        return MultiHeadAttention(self.num_heads, scale=self.gain)

    def get_config(self):
        return {**super().get_config(), "gain": self.gain}


def test_config_round_trip():
    block = make_block(
        dropout=0.1,
        num_key_value_heads=2,
        activation="relu",
        layer_norm_epsilon=1e-3,
        normalize_first=False,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.1),
        bias_initializer="ones",
        dtype="mixed_bfloat16",
        name="block",
    )
    config = block.get_config()
    restored = CustomDecoder.from_config(config)
    assert restored.get_config() == config
    assert restored.activation is keras.activations.relu
    assert restored.kernel_initializer.stddev == 0.1
    assert restored.normalize_first is False


@pytest.mark.parametrize("cls", [CustomDecoder, WindowlessDecoder])
def test_keras_file(cls, tmp_path):
    inputs = keras.Input((None, WIDTH))
    block = cls(32, 4)
    model = keras.Model(inputs, block(inputs))
    randomize(model)
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    x = make_inputs()
    np.testing.assert_allclose(to_numpy(restored(x)), to_numpy(model(x)), atol=1e-6)
    assert [type(layer) for layer in call_sites(restored)] == [cls]


def test_a_block_trains_in_any_model():
    model = keras.Sequential(
        [keras.Input((6, WIDTH)), CustomDecoder(32, 4, dropout=0.1)]
    )
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse")
    x = make_inputs(batch=8)
    history = model.fit(x, np.roll(x, 1, axis=1), epochs=4, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]


@pytest.mark.parametrize(
    "layer", [FeedForward(24), GatedFeedForward(24, use_bias=True)]
)
def test_feed_forward_config_round_trip(layer):
    config = layer.get_config()
    assert type(layer).from_config(config).get_config() == config


def test_gated_feed_forward_is_what_it_says():
    layer = GatedFeedForward(8)
    x = make_inputs()
    layer.build(x.shape)
    gate, up, down = (
        to_numpy(dense.kernel)
        for dense in (layer.gate_dense, layer.intermediate_dense, layer.output_dense)
    )
    g = x @ gate
    expected = (g / (1 + np.exp(-g)) * (x @ up)) @ down
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=1e-5)
    assert all("bias" not in w.path for w in layer.weights)
