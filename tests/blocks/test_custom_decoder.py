"""`CustomDecoder`: hooks, the order of its parts, dropout and dtypes.

The conformance suite has the block itself, its configuration and files.
"""

import types

import keras
import numpy as np
import pytest

import blocks
from attention import MultiHeadAttention
from attention.testing import check_cached_layer
from blocks import CustomDecoder, GatedFeedForward
from tests.helpers import assert_close, raises, sample, to_numpy
from tests.models import randomize

pytestmark = pytest.mark.same_everywhere

WIDTH = 16


def make_block(cls=CustomDecoder, **kwargs):
    block = cls(intermediate_dim=32, num_heads=4, **kwargs)
    block.build((None, None, WIDTH))
    randomize(block)
    return block


def check_with_a_cache(cls):
    """What replaces a part decodes, and leaves out padding."""
    check_cached_layer(
        lambda: cls(intermediate_dim=32, num_heads=4),
        max_length=8,
        batch_size=2,
        checks=["prefill_and_steps", "padding"],
    )


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
    layers = types.SimpleNamespace(CustomAttention=MultiHeadAttention)
    namespace = {
        "keras_nlp": types.SimpleNamespace(layers=blocks),
        "keras": types.SimpleNamespace(layers=layers),
        "clone_initializer": blocks.clone_initializer,
    }
    exec(SNIPPET, namespace)
    block = make_block(namespace["CustomDecoder"], dropout=0.1)
    assert type(block.self_attention) is MultiHeadAttention
    assert block.self_attention.key_dim == WIDTH // 4
    assert block.self_attention.dropout == 0.1
    check_with_a_cache(namespace["CustomDecoder"])


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
            def __init__(self, inner, width):
                super().__init__()
                self.up = keras.layers.Dense(inner, activation="relu")
                self.down = keras.layers.Dense(width)

            def call(self, x):
                return self.down(self.up(x))

        return Mlp(self.intermediate_dim, inputs_shape[-1])


class SequentialDecoder(CustomDecoder):
    def create_ffn(self, inputs_shape):
        widths = (self.intermediate_dim, inputs_shape[-1])
        return keras.Sequential([keras.layers.Dense(width) for width in widths])


@pytest.mark.parametrize("cls", [GatedRmsDecoder, SublayersDecoder, SequentialDecoder])
@pytest.mark.filterwarnings("error:.*does not have a `build:UserWarning")
def test_hooks_change_the_parts(cls):
    assert len(make_block(cls).ffn.weights) > 2
    check_with_a_cache(cls)


def test_num_key_value_heads_and_activation():
    block = make_block(num_key_value_heads=2, activation="relu")
    assert block.create_cache(1, 8)[0]["key"].shape[1] == 2
    assert block.ffn.activation is keras.activations.relu


def test_initializers_reach_the_layers():
    block = CustomDecoder(32, 4, kernel_initializer="zeros", bias_initializer="ones")
    block.build((None, None, WIDTH))
    for layer in (block.self_attention.query_dense, block.ffn.intermediate_dense):
        assert np.all(to_numpy(layer.kernel) == 0)
        assert np.all(to_numpy(layer.bias) == 1)
    block = make_block(kernel_initializer=keras.initializers.RandomNormal(seed=3))
    # A seeded initializer fills each layer as it would fill any other.
    assert block.kernel_initializer is not block.ffn.kernel_initializer


def test_normalize_first():
    x = keras.ops.convert_to_tensor(sample())
    block = make_block()
    h = x + block.self_attention(block.attention_norm(x))
    assert_close(block(x), h + block.ffn(block.ffn_norm(h)))
    block = make_block(normalize_first=False)
    h = block.attention_norm(x + block.self_attention(x))
    assert_close(block(x), block.ffn_norm(h + block.ffn(h)))


def test_dropout_acts_in_training_only():
    block = make_block(dropout=0.5)
    x = sample()
    plain, again = (to_numpy(block(x, training=training)) for training in (None, False))
    np.testing.assert_array_equal(again, plain)
    first, second = (to_numpy(block(x, training=True)) for _ in range(2))
    assert np.abs(first - plain).max() > 0.1
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_a_hook_that_forgets_the_dtype_has_the_blocks(dtype):
    before = keras.config.dtype_policy()
    block = make_block(SublayersDecoder, dtype=dtype, dropout=0.1)
    assert keras.config.dtype_policy() is before
    attention_layers = (block.self_attention, block.self_attention.query_dense)
    others = (block.ffn.up, block.attention_norm, block.residual_dropout)
    for layer in (*attention_layers, *others):
        assert layer.dtype_policy.name == dtype
    outputs = block(sample())
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    variable_dtype = "float32" if dtype.startswith("mixed") else "bfloat16"
    assert {w.dtype for w in block.weights if "seed" not in w.path} == {variable_dtype}
    cache = block.create_cache(1, 4)
    assert keras.backend.standardize_dtype(cache[0]["key"].dtype) == "bfloat16"


def test_the_policy_is_restored_when_a_hook_fails():
    class FailingDecoder(CustomDecoder):
        def create_norm(self, inputs_shape):
            raise RuntimeError("no norm today")

    before = keras.config.dtype_policy()
    with raises(RuntimeError, "no norm today"):
        make_block(FailingDecoder, dtype="bfloat16")
    assert keras.config.dtype_policy() is before
