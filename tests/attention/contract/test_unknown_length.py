"""Graphs on TensorFlow that take sequences of any length: windows and recurrences are
computed in blocks and chunks there, too, and give what they give without a graph."""

import keras
import numpy as np
import pytest
from keras import ops

from attention import (
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    Mamba2,
    Retention,
    RotaryAttention,
    RWKVTimeMix,
)
from blocks import CausalLM, CustomBackbone
from tests.helpers import assert_close, built, to_numpy
from tests.models import make_backbone

on_tensorflow = pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="only TensorFlow has graphs of unknown sizes",
)
WIDTH = 8
LAYERS = {
    "retention": lambda: Retention(2),
    "rwkv": lambda: RWKVTimeMix(2),
    "gated_delta": lambda: GatedDeltaNet(2),
    "mamba2": lambda: Mamba2(2, state_dim=4),
    "window": lambda: RotaryAttention(2, 1, window=5),
    "latent window": lambda: LatentAttention(2, window=5),
    "window on both sides": lambda: GroupedQueryAttention(2, 1, window=5, causal=False),
}


def any_length(function, *like, jit_compile=None):
    """A graph that takes tensors like these, with any number of rows and tokens."""
    import tensorflow as tf

    signature = [
        tf.TensorSpec((None, None, *x.shape[2:]), tf.as_dtype(x.dtype)) for x in like
    ]
    return tf.function(function, input_signature=signature, jit_compile=jit_compile)


def with_gradients(layer):
    """The outputs of real tokens, and gradients of the inputs and the weights."""
    import tensorflow as tf

    def call(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, padding_mask=mask)
            outputs = tf.where(mask[..., None], outputs, 0)
            loss = tf.reduce_sum(outputs**2)
        variables = [variable.value for variable in layer.trainable_variables]
        # With one token nothing depends on the queries.
        zero = tf.UnconnectedGradients.ZERO
        sources = [x, *variables]
        return outputs, tape.gradient(loss, sources, unconnected_gradients=zero)

    return call


def assert_all_close(found, expected):
    found, expected = keras.tree.flatten(found), keras.tree.flatten(expected)
    sizes = [np.abs(to_numpy(x)).max() for x in expected]
    for a, b, size in zip(found, expected, sizes):
        # A bias of all keys alike has no gradient but the rounding of others.
        assert_close(a, b, atol=3e-5 * max(1, size, max(sizes) / 10))


@on_tensorflow
@pytest.mark.parametrize("name", LAYERS)
def test_any_length_gives_what_a_known_one_gives(name):
    layer = built(LAYERS[name](), (None, None, WIDTH))
    call = with_gradients(layer)
    rng = np.random.default_rng(0)
    graph = None
    # RWKV's decays over 300 tokens, divided by, would overflow.
    for length in (1, 5, 70, 300):
        x = rng.normal(size=(2, length, WIDTH)).astype("float32")
        mask = np.arange(length) < np.array([[length], [length // 2 + 1]])
        graph = graph or any_length(call, x, mask)
        expected = call(ops.convert_to_tensor(x), ops.convert_to_tensor(mask))
        found = graph(x, mask)
        assert_all_close(found, expected)


@on_tensorflow
def test_xla_compiles_and_differentiates_any_length():
    layer = built(GatedDeltaNet(1), (None, None, WIDTH))
    call = with_gradients(layer)
    x = np.random.default_rng(0).normal(size=(2, 130, WIDTH)).astype("float32")
    mask = np.ones((2, 130), bool)
    found = any_length(call, x, mask, jit_compile=True)(x, mask)
    expected = call(ops.convert_to_tensor(x), ops.convert_to_tensor(mask))
    assert_all_close(found, expected)


@on_tensorflow
@pytest.mark.parametrize("name", ["window", "rwkv"])
def test_what_is_computed_grows_with_the_length_only(name):
    """No tensor of the graph has two axes of the sequence's length."""
    import tensorflow as tf

    layer = built(LAYERS[name](), (None, None, WIDTH))
    length = 2000
    x = np.ones((1, length, WIDTH), "float32")
    signature = [tf.TensorSpec((None, None, WIDTH))]
    graph = tf.compat.v1.wrap_function(lambda x: layer(x), signature)
    with graph.graph.as_default():
        sizes = [
            tf.size(tensor)
            for operation in graph.graph.get_operations()
            for tensor in operation.outputs
            if tensor.dtype in (tf.float32, tf.bool)
        ]
    found = graph.prune(graph.inputs[:1], sizes)(tf.constant(x))
    assert 0 < max(size.numpy() for size in found) < length**2


@on_tensorflow
def test_training_on_batches_of_different_lengths():
    """A dataset of such batches has an unknown length, on TensorFlow the graph, too."""
    import tensorflow as tf

    def batches():
        for length in (30, 200, 90, 170):
            tokens = np.arange(2 * length, dtype="int32").reshape(2, -1) % 16
            yield {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, tokens

    tokens = tf.TensorSpec((2, None), tf.int32)
    signature = ({"token_ids": tokens, "padding_mask": tokens}, tokens)
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)

    class Backbone(CustomBackbone):
        def create_attention_layer(self, inputs_shape, layer_index):
            if layer_index:
                return RotaryAttention(2, window=8)
            return RWKVTimeMix(2)

    def losses(eager):
        lm = CausalLM(make_backbone(Backbone, learned_positions=False))
        lm.compile(optimizer=keras.optimizers.SGD(0.1), run_eagerly=eager)
        history = lm.fit(dataset, epochs=2, verbose=0)
        return history.history["loss"]

    found = losses(eager=False)
    assert found[1] < found[0]
    np.testing.assert_allclose(found, losses(eager=True), rtol=1e-4)
