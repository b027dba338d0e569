"""`fit` under each dtype policy: every mixer and architecture learns as in float32."""

import math

import keras
import numpy as np
import pytest

from blocks import CausalLM, CustomBackbone, PreferenceTuning
from blocks.training import chunked_loss
from tests.attention.testing.test_conformance import LAYERS
from tests.blocks.models import (
    experts_cases,
    gpt_cases,
    llama_cases,
    recurrent_cases,
)
from tests.helpers import raises, slow, to_numpy
from tests.models import (
    VOCABULARY_SIZE,
    EagerLM,
    byte_preprocessor,
    make_backbone,
    prompts,
    randomize,
)

# How far the loss may be from float32's, before an update and after it. Adam's first
# update is the sign of the gradient, which rounding turns where it is near zero; and in
# bfloat16 its betas are rounded, which makes the update 7 % larger.
NEAR = {
    "float32": (1e-6, 1e-6),
    "mixed_bfloat16": (0.03, 0.04),
    "mixed_float16": (2e-3, 0.015),
    "bfloat16": (0.03, 0.04),
}
# The gradient is zero: of a single key's weight, whatever its logit.
UNMOVED = {"window_of_one": ["embeddings", "query/kernel", "key/kernel"]}
# Smaller weights that a layer keeps in float32 on purpose: decays, norms, routers.
SMALL = 8 * 32
# Of the loss, in float16.
SCALE = 16.0


class OneLayer(CustomBackbone):
    """A layer of the table, between the embedding and the head."""

    def __init__(self, make, **kwargs):
        self.make = make
        super().__init__(**kwargs)

    def create_decoder(self, layer_index):
        return self.make()

    def transform(self, x, padding_mask):
        (layer,) = self.transformer_layers
        return x + layer(x, padding_mask=padding_mask)


def layer_lm(name, policy):
    options = {"num_layers": 1, "learned_positions": False, "dtype": policy}
    return EagerLM(make_backbone(OneLayer, make=LAYERS[name], **options))


def tokens(size):
    rng = np.random.default_rng(0)
    x = prompts([rng.integers(1, size, length).tolist() for length in (10, 6, 1)])
    return x, np.roll(x["token_ids"], -1, axis=1)


def train(lm):
    """Returns the loss of each step, and the names of weights that stay as they are."""
    weights = lm.trainable_weights
    before = [to_numpy(x).astype("float32") for x in weights]
    x, y = tokens(lm.output.shape[-1])
    options = {"batch_size": 3, "shuffle": False, "verbose": 0}
    losses = lm.fit(x, y, epochs=4, **options).history["loss"]
    after = [to_numpy(x).astype("float32") for x in weights]
    same = zip(weights, before, after)
    return losses, [x.path for x, a, b in same if (a == b).all()]


def check_policies(make_lm, unmoved=(), updates=1):
    """Checks training under each policy beside float32; `make_lm` takes its name.

    Losses are compared after so many updates.
    """
    expected = None
    for policy, tolerances in NEAR.items():
        keras.utils.set_random_seed(0)
        lm = make_lm(policy)
        adam = keras.optimizers.Adam(0.01, beta_2=0.99)
        if policy == "mixed_float16":
            # Weights are large here, and gradients would overflow by Keras's first
            # scale: it leaves out such steps, until the scale is small enough.
            adam = keras.optimizers.LossScaleOptimizer(adam, initial_scale=SCALE)
        lm.compile(adam)
        losses, still = train(lm)
        expected = expected or losses
        if policy == "mixed_float16":
            assert float(to_numpy(adam.dynamic_scale)) == SCALE
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0] - 0.1
        for i, tolerance in enumerate(tolerances[: updates + 1]):
            assert abs(losses[i] / expected[i] - 1) < tolerance, (policy, losses)
        assert len(still) == len(unmoved), (policy, still)
        assert all(x.endswith(y) for x, y in zip(still, unmoved)), (policy, still)
        low = "bfloat16" if policy == "bfloat16" else "float32"
        for x in lm.trainable_weights:
            small = math.prod(x.shape) < SMALL
            assert x.dtype == low or (small and x.dtype == "float32"), (policy, x.path)


EVERYWHERE = ["options"]


@pytest.mark.parametrize("name", [x if x in EVERYWHERE else slow(x) for x in LAYERS])
def test_layers(name):
    check_policies(lambda policy: layer_lm(name, policy), UNMOVED.get(name, ()))


TABLES = [gpt_cases, llama_cases, experts_cases, recurrent_cases]
ARCHITECTURES = [x for table in TABLES for x in table.CASES if "-" not in x.id]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [x.values[0] for x in ARCHITECTURES], ids=lambda x: x[0]
)
def test_architectures(case, tmp_path):
    name, arguments = case
    transformers = pytest.importorskip("transformers")
    getattr(transformers, name)(**arguments).save_pretrained(tmp_path)

    def make_lm(policy):
        options = {"load_weights": False, "dtype": policy}
        lm = CausalLM.from_preset(str(tmp_path), **options)
        randomize(lm.backbone)
        return lm

    check_policies(make_lm, updates=0)


# === Loss scaling ===


def test_a_scaled_loss_has_the_gradients_of_others(monkeypatch):
    """In float16 too, those of a few positions at a time are those of all logits."""
    monkeypatch.setattr(chunked_loss, "_HEADS", 0)
    monkeypatch.setattr(chunked_loss, "_LOGITS", 3 * 2 * VOCABULARY_SIZE)
    x, y = tokens(VOCABULARY_SIZE)
    changes = {}
    # The other metric needs logits.
    top = keras.metrics.SparseTopKCategoricalAccuracy(3)
    for key, policy, metrics in (
        ("expected", "float32", [top]),
        ("logits", "mixed_float16", [top]),
        ("chunks", "mixed_float16", []),
    ):
        lm = CausalLM(make_backbone(num_layers=1, dtype=policy))
        sgd = keras.optimizers.SGD(1.0)
        if policy != "float32":
            # As small a scale as one that Keras may have come to.
            sgd = keras.optimizers.LossScaleOptimizer(sgd, initial_scale=64.0)
        lm.compile(sgd, weighted_metrics=metrics)
        before = [to_numpy(w) for w in lm.trainable_weights]
        lm.fit(x, y, batch_size=3, verbose=0)
        after = [to_numpy(w) for w in lm.trainable_weights]
        changes[key] = np.concatenate([(b - a).ravel() for a, b in zip(before, after)])
    size = np.linalg.norm(changes["expected"])
    assert size > 0.1
    for key in ("logits", "chunks"):
        assert np.linalg.norm(changes[key] - changes["expected"]) < 5e-3 * size


@pytest.mark.same_everywhere
def test_the_loss_is_scaled_in_float16_alone():
    for policy in NEAR:
        lm = EagerLM(make_backbone(num_layers=1, dtype=policy))
        lm.compile("sgd")
        scaled = isinstance(lm.optimizer, keras.optimizers.LossScaleOptimizer)
        assert scaled is (policy == "mixed_float16")


def preference_tuning(policy):
    backbone = make_backbone(num_layers=1, vocabulary_size=256, dtype=policy)
    return PreferenceTuning(EagerLM(backbone, byte_preprocessor()))


PAIRS = {"prompts": ["ab", "c"], "chosen": ["d", "ef"], "rejected": ["gh", "i"]}


@pytest.mark.same_everywhere
@pytest.mark.parametrize("policy", NEAR)
def test_preference_tuning(policy):
    tuning = preference_tuning(policy)
    eager = keras.config.backend() == "tensorflow"
    tuning.compile(keras.optimizers.Adam(0.01, beta_2=0.99), run_eagerly=eager)
    scaled = isinstance(tuning.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled is (policy == "mixed_float16")
    losses = tuning.fit(PAIRS, epochs=8, verbose=0).history["loss"]
    assert abs(losses[0] - math.log(2)) < 1e-3
    assert losses[-1] < 0.6


# === Numbers that a dtype can't hold ===


@pytest.mark.same_everywhere
def test_betas_that_round_to_one():
    """Keras's Adam would learn nothing, without a word."""
    variable = keras.Variable(np.ones(3), dtype="bfloat16")
    adam = keras.optimizers.Adam(0.1)
    adam.apply([keras.ops.ones(3, "bfloat16")], [variable])
    assert (to_numpy(variable).astype("float32") == 1).all()

    x, y = tokens(VOCABULARY_SIZE)
    lm = EagerLM(make_backbone(num_layers=1, dtype="bfloat16"))
    optimizers = keras.optimizers
    for optimizer, name in (
        (optimizers.Adam(), "beta_2=0.999"),
        (optimizers.Nadam(), "beta_2=0.999"),
        (optimizers.AdamW(beta_1=0.999, beta_2=0.99), "beta_1=0.999"),
        (optimizers.Muon(), "adam_beta_2=0.999"),
        (optimizers.LossScaleOptimizer(optimizers.Adam()), "beta_2=0.999"),
    ):
        lm.compile(optimizer)
        with raises(
            ValueError, f"`{name}`", "1 in bfloat16", "mixed_bfloat16", "=0.99"
        ):
            lm.fit(x, y, verbose=0)
    tuning = preference_tuning("bfloat16")
    tuning.compile("adam")
    with raises(ValueError, "`beta_2=0.999`", "bfloat16"):
        tuning.fit(PAIRS, verbose=0)
    # Others are fine.
    lm.compile(optimizers.SGD(0.1))
    lm.fit(x, y, verbose=0)
    lm = EagerLM(make_backbone(num_layers=1, dtype="mixed_bfloat16"))
    lm.compile(optimizers.Adam())
    lm.fit(x, y, verbose=0)
