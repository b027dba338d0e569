"""The loss and metrics of `fit` and `evaluate`: means over the tokens that count."""

import keras
import numpy as np
import pytest
from keras import ops

from blocks import CausalLM, Perplexity, TokenCrossentropy
from blocks.training import chunked_loss
from blocks.training.gradients import value_and_gradients
from tests.helpers import assert_close, to_numpy
from tests.models import (
    RAGGED,
    VOCABULARY_SIZE,
    log_softmax,
    make_backbone,
    make_text_lm,
    prompts,
)


def ragged_data(seed=0):
    x = prompts(RAGGED)
    y = np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, x["token_ids"].shape)
    return x, y.astype("int32")


def reference(logits, targets, weights, label_smoothing=0.0, z_loss=0.0):
    """The mean over tokens, as the papers have it; and the perplexity."""
    logs = log_softmax(logits)
    chosen = np.take_along_axis(logs, targets[..., None], -1)[..., 0]
    spread = np.full(logs.shape, label_smoothing / logs.shape[-1])
    np.put_along_axis(
        spread,
        targets[..., None],
        1 - label_smoothing + label_smoothing / logs.shape[-1],
        -1,
    )
    normalizer = logits[..., 0] - logs[..., 0]
    losses = -(spread * logs).sum(-1) + z_loss * normalizer**2
    mean = (losses * weights).sum() / weights.sum()
    return mean, np.exp(-(chosen * weights).sum() / weights.sum())


def compiled(backbone, loss="auto", learning_rate=0.05, **kwargs):
    lm = CausalLM(backbone)
    kwargs.setdefault("weighted_metrics", ["accuracy", Perplexity()])
    lm.compile(keras.optimizers.SGD(learning_rate), loss, **kwargs)
    return lm


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}])
def test_the_loss_is_the_mean_over_real_tokens(options):
    lm = compiled(make_backbone(num_layers=1), TokenCrossentropy(**options))
    x, y = ragged_data()
    weights = np.random.default_rng(1).uniform(size=y.shape).astype("float32")
    logits = to_numpy(lm(x))
    for given in (None, weights, weights[:, 0]):
        of_rows = None if given is None else given.reshape(len(y), -1)
        counted = x["padding_mask"] * (1.0 if given is None else of_rows)
        mean, perplexity = reference(logits, y, counted, **options)
        hits = (logits.argmax(-1) == y) * counted
        # However the rows are split into batches.
        for size in (1, 3):
            logs = lm.evaluate(
                x, y, size, sample_weight=given, verbose=0, return_dict=True
            )
            assert list(logs) == ["accuracy", "loss", "perplexity"]
            assert_close(logs["loss"], mean, atol=1e-5)
            assert_close(logs["perplexity"] / perplexity, 1.0, atol=1e-5)
            assert_close(logs["accuracy"], hits.sum() / counted.sum(), atol=1e-6)
    # So do the classes by themselves.
    loss, metric = TokenCrossentropy(**options), Perplexity()
    metric.update_state(y, ops.convert_to_tensor(logits), counted)
    mean, perplexity = reference(logits, y, counted, **options)
    assert_close(loss(y, logits, counted), mean, atol=1e-5)
    assert_close(metric.result() / perplexity, 1.0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.5}])
def test_gradients_are_those_of_the_formula(options):
    """Differences of the papers' formula, in float64."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 3, 5)) * 2
    targets, weights = random.integers(0, 5, (2, 3)), random.uniform(size=(2, 3))
    shares = ops.convert_to_tensor(weights / weights.sum(), "float32")

    def weighted(logits):
        losses, crossentropies, _ = TokenCrossentropy(**options).scores(targets, logits)
        mean, other = (ops.sum(x * shares) for x in (losses, crossentropies))
        return ops.stack([mean + 2 * other])

    def expected(logits):
        loss, perplexity = reference(logits, targets, weights, **options)
        return loss + 2 * np.log(perplexity)

    given = [ops.convert_to_tensor(logits, "float32")]
    value, (found,) = value_and_gradients(weighted, given)
    assert_close(value, [expected(logits)], atol=1e-5)
    differences = np.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        rise = expected(logits + step) - expected(logits - step)
        differences[place] = rise / 2e-5
    assert_close(found, differences, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hits(dtype):
    logits = np.random.default_rng(0).normal(size=(4, 50, 9))
    logits = ops.cast(ops.convert_to_tensor(logits, "float32"), dtype)
    targets = np.random.default_rng(1).integers(0, 9, (4, 50))
    hits = TokenCrossentropy().scores(targets, logits)[2]
    chosen = to_numpy(ops.cast(logits, "float32")).argmax(-1)
    np.testing.assert_array_equal(to_numpy(hits), chosen == targets)


def test_padding_counts_in_no_loss():
    """The same text in rows of other lengths."""
    losses = []
    for length in (8, 16, 64):
        lm = make_text_lm(sequence_length=length)
        losses.append(lm.evaluate(["hi", "there"], verbose=0))
    assert_close(losses, [losses[0]] * 3, atol=1e-5)


def test_logits_are_computed_a_few_positions_at_a_time(monkeypatch, calls_of):
    """With the gradients that all logits at once give."""
    monkeypatch.setattr(chunked_loss, "_HEADS", 0)
    monkeypatch.setattr(chunked_loss, "_LOGITS", 3 * 2 * VOCABULARY_SIZE)
    x, y = ragged_data()
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    for tied in (True, False):
        trained = []
        # The other metric needs logits.
        for other in ([], [keras.metrics.SparseTopKCategoricalAccuracy(3)]):
            backbone = make_backbone(num_layers=1, tie_word_embeddings=tied)
            metrics = [Perplexity(), *other]
            lm = compiled(
                backbone, TokenCrossentropy(**options), weighted_metrics=metrics
            )
            calls = calls_of(CausalLM, "compute_logits")
            logs = lm.fit(x, y, batch_size=3, epochs=2, verbose=0).history
            assert bool(calls) is not bool(other)
            assert all(hidden.shape[1] <= 2 for (hidden,) in calls)
            weights = [to_numpy(w) for w in lm.trainable_weights]
            trained.append((logs["loss"], logs["perplexity"], *weights))
        for first, second in zip(*trained):
            np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_a_head_of_ones_own():
    """Its weights are trained, and those that are frozen are not."""

    @keras.saving.register_keras_serializable("tests")
    class Capped(CausalLM):
        def compute_logits(self, hidden_states):
            if not hasattr(self, "head"):
                self.head = keras.layers.Dense(VOCABULARY_SIZE)
            return 5.0 * ops.tanh(self.head(hidden_states) / 5.0)

    x, y = ragged_data()
    lm = Capped(make_backbone(num_layers=1))
    lm.head.bias.trainable = False
    lm.compile(keras.optimizers.SGD(0.5), weighted_metrics=[Perplexity()])
    kernel, bias = to_numpy(lm.head.kernel), to_numpy(lm.head.bias)
    first = lm.evaluate(x, y, verbose=0)[0]
    lm.fit(x, y, epochs=4, verbose=0)
    assert lm.evaluate(x, y, verbose=0)[0] < first
    assert np.abs(to_numpy(lm.head.kernel) - kernel).max() > 1e-3
    assert_close(lm.head.bias, bias, atol=0)


def test_targets_that_are_ignored():
    x, y = ragged_data()
    ignored = np.where(np.arange(y.shape[1]) % 2, y, -100)
    kept = (ignored != -100).astype("float32")
    loss = TokenCrossentropy(ignore_class=-100)
    # The last metric needs logits.
    for others in ([], [keras.metrics.SparseTopKCategoricalAccuracy()]):
        backbone = make_backbone(num_layers=1)
        metrics = [Perplexity(ignore_class=-100), *others]
        lm = compiled(backbone, loss, weighted_metrics=metrics)
        mean, perplexity = reference(to_numpy(lm(x)), y, x["padding_mask"] * kept)
        found = lm.evaluate(x, ignored, verbose=0)
        assert_close(found[0], mean, atol=1e-5)
        assert_close(found[1] / perplexity, 1.0, atol=1e-5)
    assert_close(loss(ignored, lm(x)), loss(y, lm(x), kept), atol=1e-6)


def test_losses_of_layers_are_added():
    backbone = make_backbone(num_layers=1)
    x, y = ragged_data()
    plain = compiled(backbone).evaluate(x, y, verbose=0)[0]
    norm = backbone.layer_norm
    norm.gamma.regularizer = keras.regularizers.L2(0.1)
    added = 0.1 * float(np.square(to_numpy(norm.gamma)).sum())
    assert_close(compiled(backbone).evaluate(x, y, verbose=0)[0], plain + added)


def test_a_step_of_ones_own():
    """A subclass that computes its loss, or that has a training step of its own."""

    class Halved(CausalLM):
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            return super().compute_loss(x, y, y_pred, sample_weight, training) / 2

    class Custom(CausalLM):
        def test_step(self, data):
            x, y = data
            self.compute_loss(x, y, self(x, training=False), None, training=False)
            return self.get_metrics_result()

        if keras.config.backend() == "jax":
            test_step = CausalLM.test_step

    x, y = ragged_data()
    x = {**x, "padding_mask": np.ones_like(x["padding_mask"])}
    found = {}
    for cls in (CausalLM, Halved, Custom):
        lm = cls(make_backbone(num_layers=1))
        lm.compile()
        found[cls] = lm.evaluate(x, y, verbose=0)
    assert_close(found[Halved][0], found[CausalLM][0] / 2)
    assert_close(found[Halved][1], found[CausalLM][1])
    assert_close(found[Custom], found[CausalLM])


def test_what_was_compiled_is_saved(tmp_path):
    lm = compiled(make_backbone(num_layers=1), TokenCrossentropy(z_loss=0.5))
    lm.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x, y = ragged_data()
    assert loaded.loss.z_loss == 0.5
    found, expected = (
        z.evaluate(x, y, verbose=0, return_dict=True) for z in (loaded, lm)
    )
    assert found == pytest.approx(expected, rel=1e-5)


class Own(CausalLM):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, **kwargs):
        return super().compute_loss(x, y, y_pred, sample_weight, **kwargs)


@pytest.mark.parametrize(
    ("cls", "loss"),
    [
        (Own, TokenCrossentropy()),
        (CausalLM, keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
    ],
)
def test_padding_counts_for_no_loss_of_ones_own(cls, loss):
    x, y = ragged_data()
    lm = cls(make_backbone(num_layers=1))
    lm.compile("sgd", loss, metrics=[Perplexity()], weighted_metrics=["accuracy"])
    logits, weights = to_numpy(lm(x)), x["padding_mask"]
    mean, perplexity = reference(logits, y, weights)
    hits = ((logits.argmax(-1) == y) * weights).sum() / weights.sum()
    found = lm.evaluate(x, y, verbose=0, return_dict=True)
    expected = {"loss": mean, "perplexity": perplexity, "accuracy": hits}
    assert found == pytest.approx(expected, rel=1e-4)


def test_dropout_in_the_head_drops():
    class Dropping(CausalLM):
        def compute_logits(self, hidden_states):
            if not hasattr(self, "drop"):
                self.drop = keras.layers.Dropout(0.9)
            return super().compute_logits(self.drop(hidden_states))

    x, y = ragged_data()
    lm = Dropping(make_backbone(num_layers=1))
    lm.compile(keras.optimizers.SGD(0.0))
    plain = lm.evaluate(x, y, verbose=0)[0]
    losses = lm.fit(x, y, epochs=2, verbose=0).history["loss"]
    assert len({round(loss, 4) for loss in (plain, *losses)}) == 3


@pytest.mark.parametrize(
    ("options", "part"),
    [({"label_smoothing": 1.0}, "label_smoothing"), ({"z_loss": -1}, "z_loss")],
)
def test_odd_options(options, part):
    with pytest.raises(ValueError, match=f"`{part}`.*Received"):
        TokenCrossentropy(**options)
