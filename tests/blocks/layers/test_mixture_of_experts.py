"""Experts: against a loop over tokens, balanced, and none is ever too full."""

import keras
import numpy as np
import pytest
from keras import ops

from attention.testing import check_cached_layer
from blocks import CustomBackbone, DynamicTanh, MixtureOfExperts
from blocks.layers.group_limited_experts import GroupLimitedExperts
from blocks.layers.mixture_of_experts import _block_size
from tests.helpers import (
    assert_close,
    compiled,
    gradients,
    raises,
    randomize,
    sample,
    slow,
    to_numpy,
)
from tests.models import check_generation, make_backbone, make_lm

pytestmark = pytest.mark.same_everywhere


def made(*args, width=6, **kwargs):
    layer = MixtureOfExperts(*args, **kwargs)
    layer.build((None, None, width))
    return randomize(layer)


def silu(x):
    return x / (1 + np.exp(-x))


def chances_of(layer, x):
    logits = x @ to_numpy(layer.router.kernel).astype("float64")
    if layer.use_bias:
        logits = logits + to_numpy(layer.router.bias)
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    return chances / chances.sum(-1, keepdims=True)


def reference(layer, x):
    """One token after the other."""
    kernels = {name: to_numpy(w).astype("float64") for name, w in layer.kernels.items()}
    biases = {name: np.zeros(w.shape[::2]) for name, w in kernels.items()}
    biases.update((name, to_numpy(w)) for name, w in layer.biases.items())
    outputs = np.zeros(x.shape)
    if layer.shared is not None:
        outputs += to_numpy(layer.shared(x))
    for place in np.ndindex(*x.shape[:2]):
        token = x[place].astype("float64")
        chances = chances_of(layer, token)
        best = np.argsort(-chances)[: layer.num_experts_per_token]
        total = chances[best].sum() if layer.normalize_weights else 1
        for expert in best:
            inner = token @ kernels["intermediate"][expert]
            inner = inner + biases["intermediate"][expert]
            if layer.gated:
                gate = token @ kernels["gate"][expert] + biases["gate"][expert]
                inner = inner * silu(gate)
            else:
                inner = silu(inner)
            weight = chances[expert] / total
            found = inner @ kernels["output"][expert] + biases["output"][expert]
            outputs[place] += weight * found
    return outputs


@pytest.mark.parametrize("shape", [(3, 1), (2, 7), *map(slow, [(1, 1), (4, 50)])])
@pytest.mark.parametrize(
    ("experts", "chosen", "gated"), [(4, 2, True), (7, 1, False), (5, 5, True)]
)
def test_it_equals_a_loop_over_tokens(experts, chosen, gated, shape):
    more = {"use_bias": True, "shared_intermediate_dim": 4} if experts == 5 else {}
    layer = made(experts, 5, chosen, gated=gated, normalize_weights=gated, **more)
    x = sample(*shape, width=6)
    expected = reference(layer, x)
    assert_close(layer(x), expected)
    assert_close(compiled(lambda x: layer(x))(ops.convert_to_tensor(x)), expected)


def test_experts_of_the_best_groups():
    layer = GroupLimitedExperts(
        6, 5, 3, normalize_weights=False, groups=(3, 2), scale=2.5
    )
    layer.build((None, None, 6))
    randomize(layer)
    x = sample(2, 9, width=6)
    chances = chances_of(layer, x.reshape((18, 6)))
    weights, experts = (to_numpy(y) for y in layer.choose(chances.astype("float32")))
    best = chances.reshape((18, 3, 2)).max(-1)
    worst = best.argmin(-1)[:, None]
    # The best of the others; not those of the group that is not seen.
    allowed = np.where(np.arange(6) // 2 == worst, 0, chances)
    expected = np.argsort(-allowed, axis=-1)[:, :3]
    assert (experts == expected).all()
    assert not (experts == np.argsort(-chances, axis=-1)[:, :3]).all()
    assert_close(weights, 2.5 * np.take_along_axis(chances, expected, axis=-1))
    assert layer(x).shape == x.shape
    with raises(ValueError, "groups", "num_experts=6"):
        GroupLimitedExperts(6, 5, groups=(4, 2))


def test_few_copies_of_kernels_for_any_number_of_tokens():
    for experts in (1, 3, 8, 64):
        for pairs in (1, 7, 64, 100, 1000, 4096, 100_000):
            size = _block_size(pairs, experts)
            assert -(-pairs // size) + experts < 6 * experts + 1
            # An expert's last block may be all padding but for one token.
            assert size <= max(pairs // experts, 1)


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="only TensorFlow has graphs of unknown sizes",
)
@pytest.mark.parametrize("xla", [True, False])
def test_any_number_of_tokens_through_one_graph(xla):
    import tensorflow as tf

    layer = made(4, 5, 2)
    signature = [tf.TensorSpec((None, None, 6), tf.float32)]
    graph = tf.function(layer, input_signature=signature, jit_compile=xla)
    for shape in [(1, 1), (2, 7), (4, 50), (3, 120)]:
        x = sample(*shape, width=6)
        assert_close(graph(x), reference(layer, x))


def test_an_initializer_with_a_seed_draws_other_kernels_for_each_expert():
    layer = MixtureOfExperts(
        3, 16, kernel_initializer=keras.initializers.RandomNormal(seed=1)
    )
    layer.build((None, None, 16))
    corners = [to_numpy(x)[:, 0, 0] for x in layer.kernels.values()]
    assert len(np.unique(corners)) == np.size(corners) == 3 * len(layer.kernels)
    again = MixtureOfExperts.from_config(layer.get_config())
    again.build((None, None, 16))
    assert_close(again.kernels["output"], layer.kernels["output"])


def test_all_tokens_at_one_expert_are_all_computed():
    layer = made(8, 5, 1)
    router = np.zeros((6, 8), "float32")
    router[:, 3] = 5.0
    layer.router.kernel.assign(router)
    x = np.abs(sample(4, 100, width=6))
    outputs = to_numpy(layer(x))
    assert_close(outputs, reference(layer, x))
    assert (np.abs(outputs).max(axis=-1) > 0).all()


def test_the_loss_of_uneven_loads():
    layer = made(4, 5, 2, balance_weight=0.5)
    x = sample(3, 8, width=6)
    layer(x)
    assert layer.losses == []
    chances = chances_of(layer, x)
    chosen = np.argsort(-chances, axis=-1)[..., :2]
    # Padding does not count.
    for lengths in ([8, 8, 8], [3, 8, 5]):
        mask = np.arange(8)[None] < np.array(lengths)[:, None]
        layer = made(4, 5, 2, balance_weight=0.5)
        layer(x, padding_mask=None if mask.all() else mask, training=True)
        (loss,) = layer.losses
        shares = np.bincount(chosen[mask].ravel(), minlength=4) / chosen[mask].size
        expected = 0.5 * 4 * (shares * chances[mask].mean(axis=0)).sum()
        np.testing.assert_allclose(to_numpy(loss), expected, rtol=1e-5)


def test_gradients_reach_the_router_and_the_chosen_experts():
    layer = made(3, 5, 2)
    for gradient in gradients(layer, sample(2, 9, width=6)):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


class SparseBackbone(CustomBackbone):
    """Experts and a norm without statistics."""

    def create_ffn(self, inputs_shape, layer_index):
        return MixtureOfExperts(4, self.intermediate_dim)

    def create_norm(self, inputs_shape, layer_index):
        return DynamicTanh()


@pytest.mark.slow
def test_the_kit():
    check_cached_layer(lambda: MixtureOfExperts(4, 12), max_length=9)


def test_a_language_model_of_experts_learns_and_generates():
    lm = make_lm(make_backbone(SparseBackbone, num_layers=1))
    check_generation(lm)
    tokens = np.random.default_rng(0).integers(1, 9, (16, 8)).astype("int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    losses = lm.fit(inputs, tokens, epochs=2, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_errors():
    with raises(ValueError, "num_experts_per_token", "3", "2"):
        MixtureOfExperts(2, 8, 3)
    with raises(TypeError, "balance_weight"):
        MixtureOfExperts(2, 8, balance_weight="much")
