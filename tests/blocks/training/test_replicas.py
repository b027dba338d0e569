"""`tf.distribute.MirroredStrategy`: the same as on one device, however rows are padded."""

import keras
import pytest

from tests.helpers import run_script

SCRIPT = """
    import itertools, keras, numpy as np, tensorflow as tf
    cpus = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpus[0], two)
    from blocks import CausalLM, Muon, Perplexity
    from blocks.training import tokens_per_second
    from tests.models import make_backbone

    # A second for each step, so that rates are numbers of tokens.
    tokens_per_second.perf_counter = itertools.count().__next__

    # The second replica has far fewer tokens.
    mask = (np.arange(7) < [[7], [7], [6], [7], [2], [2], [1], [2]]).astype("int32")
    tokens = np.random.default_rng(0).integers(1, 60, mask.shape).astype("int32") * mask
    x = {"token_ids": tokens, "padding_mask": mask}
    found = []
    mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for strategy in (tf.distribute.get_strategy(), mirrored):
        with strategy.scope():
            lm = CausalLM(make_backbone(num_layers=1))
            metrics = ["accuracy", Perplexity()]
            lm.compile(OPTIMIZER, weighted_metrics=metrics)
        data = tf.data.Dataset.from_tensor_slices((x, tokens)).batch(8)
        logs = lm.fit(data, epochs=2, verbose=0).history
        assert logs["tokens_per_second"][1] == mask.sum(), logs
        weights = [np.array(weight) for weight in lm.trainable_weights]
        found.append([*(logs[name] for name in sorted(logs)), *weights])
    for first, second in zip(*found):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)
    print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of TensorFlow")
@pytest.mark.parametrize(
    # Adam would divide the differences of rounding by their own size.
    "optimizer",
    ["keras.optimizers.SGD(0.1)", "Muon(lm, 0.01, epsilon=1.0)"],
)
def test_replicas_equal_one_device(optimizer):
    run = run_script(SCRIPT.replace("OPTIMIZER", optimizer))
    assert run.stdout.strip().endswith("equal"), run.stderr[-3000:]
