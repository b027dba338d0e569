"""Updates of `Muon` are those of the papers' formulas, each kernel one matrix or several."""

import re

import keras
import numpy as np
import pytest

from attention import LatentAttention, RotaryAttention, ShortConvolution, declare_role
from blocks import CausalLM, CustomBackbone, MixtureOfExperts, Muon
from tests.helpers import raises, slow, to_numpy
from tests.models import make_backbone, make_variant

RATE, DECAY = 0.01, 0.1

# What the matrices are, by the path of a weight: how many there are, and how many of its
# first axes are rows. All others are for AdamW.
MATRICES = {
    r"(query|key|value)/kernel": (1, 1),
    r"attention_output/kernel": (1, 2),
    r"(latent|rotary_key|router|intermediate|gate|output)/kernel": (1, 1),
    r"self_attention/(key|value)_up": (4, 1),
    r"ffn/(intermediate|gate|output)_kernels": (3, 1),
    r"(query|key|value)/lora_kernel_[ab]": (1, 1),
    r"attention_output/lora_kernel_a": (1, 2),
    r"attention_output/lora_kernel_b": (1, 1),
    r"(intermediate|output)/lora_kernel_[ab]": (1, 1),
}


@keras.saving.register_keras_serializable(package="muon_tests")
class Backbone(CustomBackbone):
    """Grouped heads and experts, then latent attention and a convolution."""

    def create_attention_layer(self, inputs_shape, layer_index):
        if layer_index:
            return LatentAttention(self.num_heads, latent_dim=8, rotary_dim=2)
        return RotaryAttention(self.num_heads, num_key_value_heads=2)

    def create_ffn(self, inputs_shape, layer_index):
        if layer_index:
            return ShortConvolution(3)
        return MixtureOfExperts(3, 24, shared_intermediate_dim=8, use_bias=True)


def numpy_muon(gradient, momentum, matrix):
    """Jordan et al., 2024, with the scale of Liu et al., 2025."""
    momentum[:] = 0.95 * momentum + gradient
    number, rows = matrix
    update = (gradient + 0.95 * momentum).reshape(number, -1)
    axes = gradient.shape[1:] if number > 1 else gradient.shape
    found = []
    for x in update:
        x = x.reshape(np.prod(axes[:rows]), -1)
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        found.append(0.2 * np.sqrt(max(x.shape)) * x)
    return np.reshape(found, gradient.shape)


def numpy_adam(gradient, state, step):
    """Kingma & Ba, 2015, algorithm 1."""
    state[0] = 0.9 * state[0] + 0.1 * gradient
    state[1] = 0.95 * state[1] + 0.05 * gradient**2
    mean, square = state[0] / (1 - 0.9**step), state[1] / (1 - 0.95**step)
    return mean / (np.sqrt(square) + 1e-8)


def matrix_of(path):
    found = {x for name, x in MATRICES.items() if re.search(f"(^|/){name}$", path)}
    assert len(found) <= 1, path
    return found.pop() if found else None


def as_tensor(gradient, path):
    tensor = keras.ops.convert_to_tensor(gradient, "float32")
    if keras.config.backend() != "tensorflow" or "embeddings" not in path:
        return tensor
    import tensorflow as tf

    # Of rows of which a token has several.
    rows = tf.concat([0.75 * tensor, 0.25 * tensor], axis=0)
    indices = tf.tile(tf.range(len(gradient)), [2])
    return tf.IndexedSlices(rows, indices, gradient.shape)


def check_steps(model, optimizer, steps=3):
    """Compares steps with the formulas. Returns the paths that are for AdamW."""
    variables = model.trainable_variables
    optimizer.build(variables)
    rng, states = np.random.default_rng(0), {}
    expected = [to_numpy(x).astype("float64") for x in variables]
    for step in range(1, steps + 1):
        gradients = [rng.normal(size=x.shape) * 0.1**step for x in variables]
        tensors = [as_tensor(x, v.path) for x, v in zip(gradients, variables)]
        optimizer.apply(tensors, variables)
        for i, (variable, gradient) in enumerate(zip(variables, gradients)):
            state = states.setdefault(i, np.zeros((2, *gradient.shape)))
            matrix = matrix_of(variable.path)
            if matrix is None:
                update = numpy_adam(gradient, state, step)
            else:
                update = numpy_muon(gradient, state[0], matrix)
            expected[i] = expected[i] * (1 - RATE * DECAY) - RATE * update
            found = to_numpy(variable)
            np.testing.assert_allclose(
                found, expected[i], atol=2e-6, err_msg=variable.path
            )
    return {x.path for x in variables if matrix_of(x.path) is None}


def make_optimizer(model, **kwargs):
    return Muon(model, learning_rate=RATE, weight_decay=DECAY, **kwargs)


def test_steps_are_those_of_the_formulas():
    backbone = make_backbone(Backbone, tie_word_embeddings=False)
    optimizer = make_optimizer(backbone)
    others = {x.rsplit("/", 1)[-1] for x in check_steps(backbone, optimizer)}
    assert others >= {"embeddings", "reverse_embeddings", "gamma", "bias"}
    # One array of state for a matrix, two for others; and the step and the rate.
    number = sum(1 + (matrix_of(x.path) is None) for x in backbone.trainable_variables)
    assert len(optimizer.variables) == 2 + number


@pytest.mark.parametrize(
    ("equation", "order", "matrix"),
    [
        ("blw,hwd->blhd", (1, 0, 2), (1, 1)),
        # A matrix for each head.
        ("blhw,hwd->blhd", (0, 1, 2), (3, 1)),
        ("blhw,whd->blhd", (1, 0, 2), (3, 1)),
    ],
)
def test_axes_lie_as_the_equation_says(equation, order, matrix):
    dense = keras.layers.EinsumDense(equation, (None, 3, 4), dtype="float32")
    dense.build((None, None, 5) if "blw," in equation else (None, None, 3, 5))
    before = to_numpy(dense.kernel)
    optimizer = Muon(declare_role(dense, "query"), RATE, weight_decay=None)
    gradient = np.random.default_rng(0).normal(size=before.shape)
    optimizer.apply([as_tensor(gradient, "kernel")], dense.trainable_variables)
    gradient = gradient.transpose(order)
    update = numpy_muon(gradient, np.zeros_like(gradient), matrix)
    expected = before - RATE * update.transpose(np.argsort(order))
    np.testing.assert_allclose(to_numpy(dense.kernel), expected, atol=1e-6)


@pytest.mark.parametrize("mode", [None, slow("int4")])
def test_low_rank_updates_of_plain_and_quantized_weights(mode):
    lm = CausalLM(make_backbone(num_layers=1))
    early = Muon(lm)
    if mode is not None:
        lm.quantize(mode)
    lm.enable_lora(4, target="all")
    assert not check_steps(lm, make_optimizer(lm))
    message = ("intermediate/lora_kernel_a' and 11 others", "after `enable_lora`")
    with raises(ValueError, *message):
        early.build(lm.trainable_variables)


@pytest.mark.slow
def test_fit_learns_and_goes_on_from_a_file(tmp_path):
    lm = CausalLM(make_variant("rotary", num_layers=1))
    lm.compile(Muon(lm, learning_rate=0.02), sampler="greedy")
    rows = (np.arange(8) + np.arange(16)[:, None]).astype("int32") % 20 + 1
    x = {"token_ids": rows, "padding_mask": np.ones_like(rows)}

    def fit(lm, epochs):
        options = {"batch_size": 8, "shuffle": False, "verbose": 0}
        return lm.fit(x, rows, epochs=epochs, **options).history["loss"]

    losses = fit(lm, 8)
    assert losses[-1] < losses[0] - 1
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert isinstance(loaded.optimizer, Muon)
    np.testing.assert_allclose(fit(loaded, 2), fit(lm, 2), rtol=1e-6)
